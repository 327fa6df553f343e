"""The headline in plain words, generated from the figures: losses beside wins, and no claim that the spread covers."""

from regard.report import wording
from regard.report.labels import labelled
from regard.report.summary import DIRECTIONS, Difference, Summary, baseline_of, mechanisms_of, summarise
from regard.results import Comparison, Crossover

__all__ = ["crossings", "findings", "headline"]


def headline(comparison: Comparison) -> tuple[str, str]:
    """Two sentences: what became of accuracy, and from where on the operators pay (empty if that was not measured)."""
    comparison = labelled(comparison)
    return _accuracy_sentence(comparison), _cost_sentence(comparison)


def findings(comparison: Comparison) -> list[str]:
    """Three to six sentences below the headline: each mechanism's gain and price, then what the setting flatters."""
    baseline = baseline_of(comparison)
    said = []
    for one in summarise(comparison):
        if one.mechanism == baseline:
            continue
        clauses = [clause for clause in (_accuracy_detail(one, baseline), _operator_detail(one)) if clause]
        if clauses:
            said.append(f"{one.mechanism}: {'; '.join(clauses)}.")
    if caution := _caution(comparison):
        said.append(caution)
    return said


def crossings(comparison: Comparison) -> list[str]:
    """Every crossover as a sentence."""
    return [
        f"{one.direction.replace('+', ' + ').capitalize()}: {_crossing(one, comparison)}."
        for one in comparison.crossovers
    ]


def _accuracy_sentence(comparison: Comparison) -> str:
    baseline = baseline_of(comparison)
    paired = [(one.mechanism, one.difference) for one in summarise(comparison) if one.difference is not None]
    if not paired:
        return _without_pairs(comparison)
    shown = [(name, found) for name, found in paired if found.shown]
    if shown:
        clauses = [_accuracy_clause(name, found, baseline) for name, found in shown]
        level = [name for name, found in paired if not found.shown]
        rest = f"; {_join(level)} shows no difference" if len(level) == 1 else "; the others show no difference"
        return f"{_join(clauses)}{rest if level else ''}."
    if all(found.half_width is None for _, found in paired):
        return "One seed cannot tell the mechanisms' accuracy apart."
    if len(paired) == 1:
        return f"{paired[0][0]} shows no difference from {baseline} in accuracy."
    return f"No mechanism differs from {baseline} in accuracy beyond the spread of the seeds."


def _without_pairs(comparison: Comparison) -> str:
    finished = sum(run.finished for run in comparison.runs)
    if not finished:
        return "No run has finished, so there is no accuracy to compare."
    if len(mechanisms_of(comparison)) == 1:
        return f"{mechanisms_of(comparison)[0]} alone was trained: nothing to compare it with."
    return f"{finished} run{'s' if finished > 1 else ''} finished, but no two of one seed: nothing to compare yet."


def _accuracy_clause(name: str, found: Difference, baseline: str) -> str:
    points = f"{100 * abs(found.mean):.1f} ± {100 * (found.half_width or 0):.1f} points"
    return f"{name} is {points} {'more' if found.mean > 0 else 'less'} accurate than {baseline}"


def _accuracy_detail(one: Summary, baseline: str) -> str:
    if one.difference is None:
        return one.failure and f"its run failed ({one.failure})"
    points, verdict = wording.difference(one.difference), wording.verdict(one.difference)
    return f"{points} points of accuracy against {baseline} ({verdict})"


def _operator_detail(one: Summary) -> str:
    parts = []
    for direction in DIRECTIONS:
        sizes = sorted(tokens for found, tokens in one.speed if found == direction)
        if sizes:
            ends = [sizes[0]] if len(sizes) == 1 else [sizes[0], sizes[-1]]
            at = [f"{wording.ratio(one.speed[direction, tokens])} at {tokens:,} tokens" for tokens in ends]
            parts.append(f"{direction.replace('+', ' + ')} {' and '.join(at)}")
    return f"operator {', '.join(parts)}" if parts else ""


def _cost_sentence(comparison: Comparison) -> str:
    crossings = [one for one in comparison.crossovers if one.direction == "forward+backward"] or comparison.crossovers
    if not crossings:
        return ""
    what = crossings[0].direction.replace("+", " + ")
    return f"Operator, {what}: {'; '.join(_crossing(one, comparison) for one in crossings)}."


def _crossing(one: Crossover, comparison: Comparison) -> str:
    """The crossover is one of medians; what the quartiles do not tell apart is not called faster."""
    baseline = baseline_of(comparison)
    speeds = next((found.speed for found in summarise(comparison) if found.mechanism == one.mechanism), {})
    here = {tokens: ratio for (direction, tokens), ratio in speeds.items() if direction == one.direction}
    faster = [tokens for tokens, ratio in sorted(here.items()) if ratio.shown and ratio.value > 1]
    if one.always and len(faster) == len(here):
        return f"{one.mechanism} is faster than {baseline} at every size measured"
    if one.always and faster:
        return f"{one.mechanism} is nowhere slower than {baseline}, and clearly faster from {faster[0]:,} tokens"
    if one.always:
        return f"{one.mechanism} is level with {baseline}"
    if one.tokens is None:
        return f"{one.mechanism} is not faster than {baseline} at the largest size measured"
    return f"{one.mechanism} overtakes {baseline} from about {wording.number(one.tokens)} tokens"


def _caution(comparison: Comparison) -> str:
    tokens = max((run.tokens for run in comparison.runs), default=0)
    sizes = [point.tokens for point in comparison.costs]
    count = f"{tokens:,} tokens" if tokens else "few tokens"
    more = f" Read the operator's cost up to {max(sizes):,} tokens for what large images would pay." if sizes else ""
    if not comparison.runs:
        return more.strip()
    return (
        f"Small images flatter dense attention: with {count} to an image, attending to all of them costs little, so "
        f"the training times here say little about large images.{more}"
    )


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
