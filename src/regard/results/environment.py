"""Where figures were measured."""

from dataclasses import dataclass

__all__ = ["Environment"]


@dataclass
class Environment:
    """Where the figures were measured."""

    machine: str
    cores: int
    threads: int
    instruction_set: str
    device: str
    python: str
    torch: str
    timm: str
    regard: str
    commit: str
    date: str
