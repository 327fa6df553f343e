"""Numbers and sentences."""

import pytest

from regard.report import wording
from regard.report.findings import crossings, findings, headline
from regard.report.summary import Difference, Ratio
from regard.results import Crossover


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345, "12,300")],
)
def test_numbers_have_three_digits(value, text):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("found", "text", "verdict"),
    [
        (Difference(0.006, 0.003, 3), "+0.6 ± 0.3", "more accurate"),
        (Difference(-0.006, 0.003, 3), "−0.6 ± 0.3", "less accurate"),
        (Difference(0.006, 0.007, 3), "+0.6 ± 0.7", "no difference shown"),
        (Difference(0.006, None, 1), "+0.6", "one seed, cannot tell"),
        (None, "–", "–"),
    ],
)
def test_differences_come_with_their_verdict(found, text, verdict):
    assert wording.difference(found) == text
    assert wording.verdict(found) == verdict


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Ratio(1.6, 1.5, 1.7), "1.60x faster"),
        (Ratio(0.5, 0.45, 0.55), "2.00x slower"),
        (Ratio(1.05, 0.98, 1.1), "level"),
        (None, "–"),
    ],
)
def test_ratios_are_told_from_the_mechanisms_side(found, text):
    assert wording.ratio(found) == text


def test_the_headline_tells_the_loss_and_what_is_not_shown(comparison):
    accuracy, cost = headline(comparison)
    assert (
        accuracy == "knn(topk=0.125) is 1.0 ± 0.2 points less accurate than dense; knn(topk=0.5) shows no difference."
    )
    assert "knn(topk=0.125) overtakes dense from about 470 tokens" in cost


def test_the_headline_claims_nothing_where_all_is_covered(comparison):
    comparison.runs = [run for run in comparison.runs if run.mechanism != "knn(topk=0.125)"]
    comparison.settings["mechanisms"] = ["dense", "knn(topk=0.5)"]
    assert headline(comparison)[0] == "knn(topk=0.5) shows no difference from dense in accuracy."


def test_the_headline_of_one_seed_cannot_tell(comparison):
    comparison.runs = [run for run in comparison.runs if run.seed == 0]
    assert headline(comparison)[0] == "One seed cannot tell the mechanisms' accuracy apart."


def test_the_headline_without_finished_runs(comparison):
    for run in comparison.runs:
        run.finished = False
    assert headline(comparison)[0] == "No run has finished, so there is no accuracy to compare."


def test_findings_hold_losses_beside_wins_and_the_caution(comparison):
    said = " ".join(findings(comparison))
    assert "1.30x slower at 196 tokens and 1.77x faster at 3,136 tokens" in said
    assert "no difference shown" in said
    assert "Small images flatter dense attention: with 196 tokens" in said


def test_crossings_name_what_never_and_what_always_wins(comparison):
    name = "knn(topk=0.5)"
    comparison.crossovers = [Crossover(name, "forward", None), Crossover(name, "forward", 196.0, always=True)]
    times = {p.tokens: p.seconds for p in comparison.costs if (p.mechanism, p.direction) == ("dense", "forward")}
    for factor, told in ((0.5, "is faster than dense at every size measured"), (0.99, "is level with dense")):
        for point in comparison.costs:
            if (point.mechanism, point.direction) == (name, "forward"):
                point.seconds = factor * times[point.tokens]
                point.seconds_low, point.seconds_high = 0.97 * point.seconds, 1.05 * point.seconds
        never, always = crossings(comparison)
        assert never == f"Forward: {name} is not faster than dense at the largest size measured."
        assert always == f"Forward: {name} {told}."
