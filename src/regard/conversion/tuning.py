"""Tuning: the cheapest mechanism for each layer of a model, found by measuring."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard import __version__
from regard.conversion._progress import ProgressBar, progress_bar
from regard.conversion._snapshot import left_as_found
from regard.conversion.api import converted, find_attention, unwrapped
from regard.conversion.choice import Choice, convertible
from regard.conversion.fidelity import Features, features_of, picture_fidelity
from regard.conversion.flops import counting_flops
from regard.conversion.recording import Found
from regard.conversion.seam import Seam, install, remove
from regard.results import MeasuredSetting, PictureFidelity, Tuning, to_json, write_text
from regard.specs import Mechanism, nearest

__all__ = ["DEFAULT_CANDIDATES", "MEASURES", "tune"]

# From centroids alone to a quarter of the keys one by one.
DEFAULT_CANDIDATES = tuple(f"multipole(near={near})" for near in (0, 0.03125, 0.0625, 0.125, 0.25))
MEASURES = ("cosine", "centred_cosine", "worst_cosine", "worst_centred_cosine")

_EXAMPLES = 2  # pictures on which the candidates are tried for a refusal, as in `convert`


def tune(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    fidelity: float = 0.995,
    mechanism: Mechanism | str | Sequence[Mechanism | str] = DEFAULT_CANDIDATES,
    measure: str = "cosine",
    where: str | Sequence[str] | None = None,
    num_prefix_tokens: int | None = None,
    file: str | Path | None = None,
    show_progress: bool = True,
) -> Tuning:
    """Find the cheapest mechanism for each attention module such that the model's features stay what they were.

        tuning = regard.tune(model, images, fidelity=0.995, file="measured.json")
        print(tuning)
        regard.convert(model, tuning.pattern)

    Each module is measured with each candidate while all others are dense. That gives an order of steps: one module
    after the other is lowered, that first which loses least for each FLOP saved. How many of these steps the whole
    model bears is found by bisection; then each further step that saves something is tried, and undone if it takes the
    model below `fidelity`. Nothing is taken for granted: the setting found is put in by `regard.convert` and measured
    once more, and if it does not hold (a file of measurements from another machine), the next cheapest is taken.
    FLOPs are those of torch's flop counter: fewer need not mean fewer seconds, so time what you found.

    Costs a forward of all images for each module and candidate, and about two for each module after that. The model is
    left as it was found, after an error and Ctrl-C, too.

    Args:
        model: any model that `convert` takes and whose features `features_of` can read, not converted yet.
        images: (B, channels, height, width), or batches of them, on the model's device and as the model wants them.
            A setting holds for pictures like these; ten or more that differ tell more than many that do not.
        fidelity: what the mean of `measure` over the images shall not fall below, in (0, 1].
        mechanism: the candidates, in any order.
        measure: `cosine` or `centred_cosine` of the patch features, mean over the patches, or `worst_cosine` or
            `worst_centred_cosine`, their 1st percentile. Definitions: `regard.conversion.picture_fidelity`.
        where: tune only modules whose names match this pattern, or one of these.
        num_prefix_tokens: see `features_of`.
        file: measurements are written here, each at once, and found again when the same question is asked later, also
            with another `fidelity`, `measure` or other candidates.
        show_progress: a bar on a terminal, and a line for each setting of the whole model; on standard error.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range; a model that cannot be converted (see `convert`); images that it refuses;
            `file` holds measurements of another model or of other images.
        FloatingPointError: NaN or infinity among the features.
    """
    root = unwrapped(model)
    candidates = _candidates(mechanism)
    if isinstance(fidelity, bool) or not isinstance(fidelity, int | float) or not 0.0 < fidelity <= 1.0:
        raise ValueError(f"fidelity: expected a number in (0, 1], such as 0.995, got {fidelity!r}")
    if measure not in MEASURES:
        raise ValueError(f"measure: unknown name {measure!r}; known: {', '.join(nearest(str(measure), MEASURES))}")
    batches = _batches(images)
    with left_as_found(root), progress_bar("tuning", show=show_progress) as bar:
        bar.say("looking for attention")
        places = _places(root, candidates, where, batches[0][:_EXAMPLES])
        log = _Log.open(None if file is None else Path(file), root, batches, num_prefix_tokens)
        search = _Search(root, batches, places, log, bar, num_prefix_tokens)
        return search.run(float(fidelity), measure)


_Step = tuple[str, Mechanism]  # a module, and what it shall have
_Places = dict[Mechanism, dict[str, Found]]


@dataclass(frozen=True)
class _Prices:
    """What each step loses and saves while all other modules are dense.

    Args:
        losses: of the measure.
        savings: in FLOPs.
    """

    losses: dict[_Step, float]
    savings: dict[_Step, int]

    def following(self, setting: Mapping[str, Mechanism], limits: Mapping[str, float]) -> _Step | None:
        """The step that loses least for each FLOP that it saves beyond the setting; None if none saves any.

        Args:
            limits: by module, the loss that a step must stay below.
        """
        best: tuple[tuple[float, int], _Step] | None = None
        for step, loss in self.losses.items():
            name = step[0]
            lost, saved = loss, self.savings[step]
            if name in setting:
                lost -= self.losses[name, setting[name]]
                saved -= self.savings[name, setting[name]]
            if saved > 0 and loss < limits.get(name, math.inf):
                price = (lost / saved, -saved)
                best = (price, step) if best is None or price < best[0] else best
        return None if best is None else best[1]

    def path(self) -> list[_Step]:
        """All steps, one following the other from dense attention on; a module may be lowered several times."""
        steps: list[_Step] = []
        while (step := self.following(dict(steps), {})) is not None:
            steps.append(step)
        return steps


@dataclass
class _Search:
    """Measures settings of a model, and finds one.

    Args:
        places: what was found in the model, by candidate and module name.
    """

    model: nn.Module
    batches: list[Tensor]
    places: _Places
    log: "_Log"
    bar: ProgressBar
    num_prefix_tokens: int | None
    dense: list[Features] = field(default_factory=list)

    def run(self, target: float, measure: str) -> Tuning:
        names = list(next(iter(self.places.values())))
        possible = [
            (name, mechanism)
            for name in names
            for mechanism, found in self.places.items()
            if found[name].mechanism is not None
        ]
        self.bar.start(1 + 2 * len(possible) + 1)
        self.bar.say("dense attention")
        self.dense = [self._features(batch) for batch in self.batches]
        dense = self.measure({})
        alone = {step: self.measure({step[0]: step[1]}) for step in possible}
        tried = self._lower(dense, alone, target, measure)
        tuning = Tuning(
            model=type(self.model).__name__,
            measure=measure,
            target=target,
            dense=dense,
            best=dense,
            alone=tuple(alone.values()),
            steps=tuple(tried),
            left={name: self._reason(name) for name in names if not any(name == step[0] for step in possible)},
            modules=tuple(names),
        )
        return self._verified(tuning)

    def _lower(
        self, dense: MeasuredSetting, alone: dict[_Step, MeasuredSetting], target: float, measure: str
    ) -> list[MeasuredSetting]:
        """All that was tried, in order."""
        hopeful = {step: one for step, one in alone.items() if one.value(measure) >= target}
        prices = _Prices(
            {step: 1 - one.value(measure) for step, one in hopeful.items()},
            {step: dense.flops - one.flops for step, one in hopeful.items()},
        )
        tried: list[MeasuredSetting] = []

        def holds(setting: dict[str, Mechanism], what: str) -> bool:
            found = self.measure(setting)
            tried.append(found)
            value, saved = found.value(measure), 100 * (1 - found.flops / dense.flops)
            undone = "" if value >= target else ", undone"
            self.bar.tell(f"{what}: {measure} {value:.5f}, {saved:.1f} % of the FLOPs saved{undone}")
            return value >= target

        path = prices.path()
        held, fails = 0, len(path) + 1
        while fails - held > 1:  # the longest part of the path that holds, by bisection
            count = len(path) if fails > len(path) else (held + fails) // 2
            self.bar.remaining((fails - held).bit_length() + 2)
            if holds(dict(path[:count]), f"{count} of {len(path)} steps"):
                held = count
            else:
                fails = count
        setting, limits = dict(path[:held]), dict[str, float]()
        refused = path[held : held + 1]
        while True:
            for step in refused:  # what loses as much or more in this module is not tried
                limits[step[0]] = prices.losses[step]
            following = prices.following(setting, limits)
            if following is None:
                return tried
            name, mechanism = following
            self.bar.remaining(2)
            if holds({**setting, name: mechanism}, f"{name}: {mechanism}"):
                setting[name], refused = mechanism, []
            else:
                refused = [following]

    def _verified(self, tuning: Tuning) -> Tuning:
        """The cheapest setting that holds when `convert` puts it in and nothing is taken from the log."""
        for held in reversed(tuning.curve[1:]):
            self.bar.say("the setting found, once more")
            found = dataclasses.replace(tuning, best=held)
            with converted(self.model, found.pattern, example_inputs=self.batches[0][:_EXAMPLES]):
                found = dataclasses.replace(found, best=self._measured(held.setting))
            self.bar.advance()
            if found.holds(found.best):
                return found
        return tuning

    def measure(self, setting: dict[str, Mechanism]) -> MeasuredSetting:
        """A setting's fidelity and FLOPs, from the log if it was measured before."""
        texts = {name: str(mechanism) for name, mechanism in setting.items()}
        found = self.log.find(texts)
        if found is None:
            self.bar.say(", ".join(f"{name}: {text}" for name, text in list(texts.items())[-1:]) or "dense attention")
            with self._installed(setting):
                found = self._measured(texts)
            self.log.add(found)
        self.bar.advance()
        return found

    @contextmanager
    def _installed(self, setting: dict[str, Mechanism]) -> Iterator[None]:
        """The seams that `convert` would put in, without its run of the model."""
        seams: list[Seam] = []
        try:
            for name, mechanism in setting.items():
                one = self.places[mechanism][name]
                before = vars(one.module).get("forward")
                seams.append(Seam(one.module, mechanism, one.adapter, one.layout, before))
                install(seams[-1], one.around)
            yield
        finally:
            for seam in reversed(seams):
                remove(seam)

    def _measured(self, setting: dict[str, str]) -> MeasuredSetting:
        """The model as it is now, against dense attention."""
        flops, pictures = 0, list[PictureFidelity]()
        for batch, dense in zip(self.batches, self.dense, strict=True):
            with counting_flops() as counter:
                found = self._features(batch)
            flops += counter.get_total_flops()
            pictures += picture_fidelity(dense.tokens, found.tokens, num_prefix_tokens=dense.num_prefix_tokens)
        return MeasuredSetting(dict(setting), flops, tuple(pictures))

    def _features(self, batch: Tensor) -> Features:
        found = features_of(self.model, batch, num_prefix_tokens=self.num_prefix_tokens)
        return Features(found.tokens.cpu(), None, found.num_prefix_tokens)

    def _reason(self, name: str) -> str:
        """Why a module takes no candidate; the last one's reason if they differ."""
        return next(reversed(self.places.values()))[name].reason


class _Log:
    """Measurements by setting, on disk if there is a file."""

    def __init__(self, path: Path | None, fingerprint: dict[str, str]) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.known: dict[str, MeasuredSetting] = {}

    @classmethod
    def open(cls, path: Path | None, model: nn.Module, batches: Sequence[Tensor], prefix: int | None) -> "_Log":
        """Raises ValueError if the file is of another question, or none of ours."""
        if path is None:
            return cls(None, {})
        log = cls(path, _fingerprint(model, batches, prefix))
        if not path.parent.is_dir():
            raise ValueError(f"file: the folder {path.parent} does not exist; make it, or name another file")
        if not path.exists():
            return log
        elsewhere = "name another file, or delete this one"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            made_of = dict(content["fingerprint"])
            measured = [MeasuredSetting.from_dict(one) for one in content["measured"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"file: {path} holds no measurements of regard.tune ({error}); {elsewhere}") from error
        for name, value in log.fingerprint.items():
            if made_of.get(name) != value:
                raise ValueError(f"file: {path} was measured with {name} other than now; {elsewhere}")
        log.known = {_key(one.setting): one for one in measured}
        return log

    def find(self, setting: dict[str, str]) -> MeasuredSetting | None:
        return self.known.get(_key(setting))

    def add(self, one: MeasuredSetting) -> None:
        self.known[_key(one.setting)] = one
        if self.path is not None:
            content = {
                "fingerprint": self.fingerprint,
                "measured": [dataclasses.asdict(known) for known in self.known.values()],
            }
            write_text(self.path, to_json(content) + "\n")


def _candidates(mechanism: Mechanism | str | Sequence[Mechanism | str]) -> list[Mechanism]:
    given = [mechanism] if isinstance(mechanism, str | Mechanism) else mechanism
    if not isinstance(given, Sequence):
        raise TypeError(
            "mechanism: expected a mechanism, its text or a sequence of them, such as ['knn(topk=0.25)', "
            f"'knn(topk=0.5)'], got {type(mechanism).__name__}"
        )
    found = [convertible(one) for one in given]
    if not found:
        raise ValueError("mechanism: no candidate given; give at least one, such as 'multipole'")
    if len(set(found)) < len(found):
        twice = next(text for text in found if found.count(text) > 1)
        raise ValueError(f"mechanism: {twice} is given twice")
    return found


def _batches(images: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(images, Tensor | Iterable):
        raise TypeError(f"images: expected a tensor or batches of them, got {type(images).__name__}")
    batches = [images] if isinstance(images, Tensor) else list(images)
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise TypeError(f"images: expected tensors, got {type(batch).__name__}; timm's transforms make them")
        if batch.dim() != 4 or not len(batch):
            raise ValueError(f"images: expected (B, channels, height, width), got shape {tuple(batch.shape)}")
    if not batches:
        raise ValueError("images: there are none; pass at least one batch")
    return batches


def _places(
    model: nn.Module, candidates: Sequence[Mechanism], where: str | Sequence[str] | None, examples: Tensor
) -> _Places:
    places: _Places = {}
    for mechanism in candidates:
        choice = Choice(mechanism, where)
        try:
            found, _ = find_attention(model, choice, examples)
        except ValueError as error:
            raise ValueError(str(error).replace("example_inputs", "images")) from error
        if not found:
            raise ValueError(f"model: {type(model).__name__} has no attention that regard can see")
        choice.check(one.name for one in found)
        places[mechanism] = {one.name: one for one in found}
    return places


def _fingerprint(model: nn.Module, batches: Sequence[Tensor], prefix: int | None) -> dict[str, str]:
    """What a measurement depends on beside its setting."""
    weights, pixels = hashlib.sha256(type(model).__qualname__.encode()), hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(_bytes(tensor))
    for batch in batches:
        pixels.update(f"{batch.dtype} {tuple(batch.shape)}".encode())
        pixels.update(_bytes(batch))
    return {
        "weights": weights.hexdigest(),
        "images": pixels.hexdigest(),
        "num_prefix_tokens": str(prefix),
        "regard": __version__,
        "torch": torch.__version__,
    }


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _key(setting: dict[str, str]) -> str:
    return json.dumps(setting, sort_keys=True)
