"""An exported model beside the one it came from."""

from dataclasses import dataclass, field

from regard.results.environment import Environment

__all__ = ["ExportCheck", "ExportStudy"]


@dataclass
class ExportCheck:
    """The file's output beside the model's, on the same images.

    Args:
        batch, size: how many images, and their side in pixels.
        seen: this is what the model was exported with.
        difference: the largest absolute difference of two outputs.
        largest: the largest absolute output of the model.
        same_top1: share of the images whose largest output is the same class.
    """

    batch: int
    size: int
    seen: bool
    difference: float
    largest: float
    same_top1: float


@dataclass
class ExportStudy:
    """What `regard export` wrote and found.

    Args:
        mechanism: what the model was converted to; "as it is" if it was not.
        converted: how many of its `attentions` were.
        bytes: of the file. weights: of the model's weights.
        seconds, exported_seconds: one image, the model in eager mode and the file; medians of interleaved rounds.
    """

    model: str
    mechanism: str
    converted: int
    attentions: int
    format: str
    file: str
    bytes: int
    weights: int
    checks: list[ExportCheck]
    seconds: float
    exported_seconds: float
    repeats: int
    environment: Environment
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        what = self.mechanism
        if self.attentions:
            what += f", {self.converted} of {self.attentions} attention modules"
        lines = [f"{self.model} ({what}) as {self.format}: {self.file}"]
        lines.append(f"size: {self.bytes / 1e6:.1f} MB; the weights alone are {self.weights / 1e6:.1f} MB")
        for one in self.checks:
            shown = "as exported" if one.seen else "not seen at export"
            lines.append(
                f"{one.batch} x {one.size} pixels ({shown}): largest difference {one.difference:.2g}, outputs up to "
                f"{one.largest:.2g}; same largest output: {one.same_top1:.0%}"
            )
        lines.append(
            f"one image: the model {self.seconds * 1e3:.1f} ms, the file {self.exported_seconds * 1e3:.1f} ms "
            f"(medians of {self.repeats} interleaved rounds, {self.environment.threads} threads)"
        )
        return "\n".join([*lines, *self.notes])
