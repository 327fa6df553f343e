"""Which devices are here."""

import torch

from regard.studies.settings import SettingsError

__all__ = ["check_device"]


def check_device(name: str) -> None:
    """Raise SettingsError unless torch knows the device and it is here."""
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    known += ["mps"] if torch.backends.mps.is_available() else []
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError("device", f"{name!r} is no device; here are {', '.join(known)}") from error
    found = f"{device.type}:{device.index or 0}" if device.type == "cuda" else device.type
    if found not in known:
        raise SettingsError("device", f"{name!r} is not here; here are {', '.join(known)}")
