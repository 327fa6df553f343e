"""The folder of a comparison: every finished run at once on disk, found again on resume."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.results import CostPoint, Environment, TrainingRun, to_json, write_text
from regard.studies.settings import SettingsError

__all__ = ["RunStore", "StoredRun", "check_fingerprint", "slug"]


def slug(text: str) -> str:
    """`text` as part of a file's name: `knn(topk=0.5)` -> `knn-topk-0.5`. Different texts may give the same."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def check_fingerprint(made_under: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raise SettingsError if a stored result was made under other settings; it names the first and the way out."""
    wanted = json.loads(to_json(wanted))
    for name in [*wanted, *(other for other in made_under if other not in wanted)]:
        if wanted.get(name) != made_under.get(name):
            raise SettingsError(
                "out",
                f"{path} was made with {name}={made_under.get(name)!r}, now {name}={wanted.get(name)!r}; "
                "choose another folder, or pass --overwrite (overwrite=True)",
            )


@dataclass(frozen=True)
class StoredRun:
    """A finished run, and where it was made."""

    run: TrainingRun
    environment: Environment


@dataclass(frozen=True)
class RunStore:
    """Runs in `folder`/runs, one JSON and one weights file each, and the operators' cost in `folder`/costs.json.

    Args:
        folder: the comparison's output folder.
        fingerprint: what must be the same for a stored run to count: settings by name, as JSON gives them back.
    """

    folder: Path
    fingerprint: dict[str, Any]

    def run_path(self, mechanism: str, seed: int) -> Path:
        return self.folder / "runs" / f"{slug(mechanism)}-seed{seed}.json"

    def weights_path(self, mechanism: str, seed: int) -> Path:
        return self.run_path(mechanism, seed).with_suffix(".safetensors")

    def save(self, run: TrainingRun, environment: Environment) -> None:
        """Write a run. Its weights must be on disk already: a run that is found is a run whose weights are found."""
        content = {
            "fingerprint": self.fingerprint,
            "environment": dataclasses.asdict(environment),
            "run": dataclasses.asdict(run),
        }
        write_text(self.run_path(run.mechanism, run.seed), to_json(content) + "\n")

    def load(self, mechanism: str, seed: int) -> tuple[StoredRun | None, str]:
        """The stored run if it is there and whole, and what was wrong with it otherwise (empty if there is none).

        Raises:
            SettingsError: the run was made under other settings; it names them and the way out.
        """
        path = self.run_path(mechanism, seed)
        if not path.exists():
            return None, ""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            run = TrainingRun.from_dict(content["run"])
            environment = Environment(**content["environment"])
            made_under = dict(content["fingerprint"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            return None, f"{path} cannot be read ({type(error).__name__}: {error})"
        check_fingerprint(made_under, self.fingerprint, path)
        if run.mechanism != mechanism or run.seed != seed:
            return None, f"{path} holds {run.mechanism}, seed {run.seed}"
        if not run.finished or not run.epochs:
            return None, f"{path} holds an unfinished run"
        if not self.weights_path(mechanism, seed).exists():
            return None, f"{self.weights_path(mechanism, seed)} is missing"
        return StoredRun(run, environment), ""

    def save_costs(self, costs: list[CostPoint], asked: dict[str, Any]) -> None:
        """Write the operators' cost, with what was asked for."""
        content = {"asked": asked, "costs": [dataclasses.asdict(point) for point in costs]}
        write_text(self.folder / "costs.json", to_json(content) + "\n")

    def load_costs(self, asked: dict[str, Any]) -> list[CostPoint] | None:
        """The operators' cost, if it was measured for the same question; it is cheap to measure again."""
        try:
            content = json.loads((self.folder / "costs.json").read_text(encoding="utf-8"))
            if content["asked"] != json.loads(to_json(asked)):
                return None
            return [CostPoint(**point) for point in content["costs"]]
        except (ValueError, KeyError, TypeError, OSError):
            return None
