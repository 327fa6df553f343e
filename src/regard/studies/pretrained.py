"""A pretrained model for a study, from a file or fetched by timm, and photographs as it wants them."""

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from regard.backbones import create_model
from regard.studies.photographs import open_photograph
from regard.studies.settings import SettingsError

__all__ = ["build_pretrained", "copy_sharing_weights", "model_size", "pixels_of", "read_picture"]


def build_pretrained(
    name: str,
    *,
    checkpoint: Path | None = None,
    random_weights: bool = False,
    size: int | None = None,
    any_size: bool = False,
) -> nn.Module:
    """A model in evaluation mode, for square images of `size` pixels where it can be told.

    Args:
        name: of a model of timm or regard.
        checkpoint: its weights; position embeddings of another size are resampled as timm does. None lets timm fetch
            them.
        random_weights: take those of a new model (seed 0) instead.
        any_size: let models that check their images' size take others, too.

    Raises:
        SettingsError: the name is unknown, the weights are missing, do not fit or cannot be fetched, or the model
            cannot be built at that size.
    """
    if checkpoint is not None and not checkpoint.is_file():
        raise SettingsError("checkpoint", f"{checkpoint} is no file; give one with the weights of {name}")
    options: dict[str, Any] = {"pretrained": not random_weights}
    if any_size:
        options["dynamic_img_size"] = True  # of timm's ViTs; others take any size, or tell when they see one
    if checkpoint is not None:
        options["pretrained_cfg_overlay"] = {"file": str(checkpoint)}
    try:
        return _created(name, size, options)
    except SettingsError:
        raise
    except ValueError as error:
        if str(error).startswith("name: "):
            raise SettingsError("model", str(error).removeprefix("name: ")) from error
        raise _refused(name, checkpoint, random_weights, error) from error
    except Exception as error:  # whatever timm, the hub's client and the readers of files raise
        raise _refused(name, checkpoint, random_weights, error) from error


def _created(name: str, size: int | None, options: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return create_model(name, **options if size is None else {**options, "img_size": size}).eval()
        except TypeError as error:
            # A model without such an option takes images of any size, or tells when it sees them.
            if "dynamic_img_size" in options and "dynamic_img_size" in str(error):
                return _created(name, size, {k: v for k, v in options.items() if k != "dynamic_img_size"})
            if size is None or "img_size" not in str(error):
                raise
            return _created(name, None, options)
        except AssertionError as error:
            raise SettingsError("size", f"{name} cannot be built for {size} pixels: {error}") from error


def _refused(name: str, checkpoint: Path | None, random_weights: bool, error: Exception) -> SettingsError:
    told = " ".join(str(error).split())[:300] or type(error).__name__
    if checkpoint is not None:
        return SettingsError("checkpoint", f"{checkpoint} does not fit {name}: {told}")
    if random_weights:
        return SettingsError("model", f"{name} cannot be built: {told}")
    wanted = _wanted(name)
    if not wanted:
        return SettingsError(
            "checkpoint", f"none are published for {name} that timm could fetch; give the file of its weights"
        )
    return SettingsError(
        "checkpoint",
        f"timm could not fetch the weights of {name} ({type(error).__name__}). It wanted {wanted}. Fetch it where "
        "there is internet, bring it here, and pass --checkpoint FILE",
    )


def _wanted(name: str) -> str:
    """Which file timm fetches for a model; empty if there is none."""
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return ""
    said: list[str] = []
    if config.hf_hub_id:
        file = config.hf_hub_filename or "model.safetensors"
        said.append(f"{file} of the Hugging Face repository {config.hf_hub_id}")
    if config.url:
        said.append(str(config.url))
    return ", or ".join(said)


def model_size(model: nn.Module) -> int:
    """Side of the square images that a model was made for, in pixels."""
    return int(resolve_model_data_config(model)["input_size"][-1])


def read_picture(model: nn.Module, path: Path, size: int, *, setting: str = "images") -> Tensor:
    """(1, 3, size, size): the middle square of a photograph, normalised as the model was trained.

    Raises:
        SettingsError: the file is no photograph that can be read.
    """
    config = resolve_model_data_config(model)
    transform = create_transform(
        (3, size, size), interpolation="bicubic", mean=config["mean"], std=config["std"], crop_pct=1.0
    )
    image: Tensor = transform(open_photograph(path, setting=setting))
    return image[None]


def pixels_of(model: nn.Module, picture: Tensor) -> Tensor:
    """(3, height, width), 0-255: what `read_picture` read, before it was normalised."""
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    return ((picture[0].cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """A second model whose parameters and buffers are the first one's."""
    shared = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
