"""The report of a conversion, from a hand-made study: every verdict, what is missing, and texts from outside."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from regard.report.conversion import (
    conversion_headline,
    conversion_table,
    conversion_terminal,
    render_conversion,
    trade_off,
    write_conversion_report,
)
from regard.results import (
    AttentionMap,
    ConversionRecord,
    ConversionRow,
    ConversionStudy,
    ConvertedModel,
    ConvertedPhoto,
    Environment,
    Fidelity,
    MeasuredSetting,
    PictureFidelity,
    Tuning,
)

NAMES = ("knn(topk=0.25)", "multipole", "tuned")


def picture(cosine, top1=None):
    return PictureFidelity(4, cosine, cosine - 0.01, 1 - cosine, cosine - 0.05, cosine - 0.1, 0.9, top1)


def setting(flops, cosine, **modules):
    return MeasuredSetting(modules, flops, (picture(cosine), picture(cosine)))


def model(name, speed, fidelity=None, memory=12_000_000):
    record = ConversionRecord(
        "Vit",
        "images",
        (
            ConversionRow("blocks.0.attn", "Attention", 5, 5, 2, "knn(topk=0.25)"),
            ConversionRow("pool.<b>", "Attention", 1, 5, 2, None, "a pool"),
        ),
    )
    return ConvertedModel(
        name, 0.1 / speed, 0.09 / speed, 0.11 / speed, speed, 0.97 * speed, 1.03 * speed, 7, 4 * 10**9, memory,
        record=None if fidelity is None else record, fidelity=fidelity,
    )  # fmt: skip


@pytest.fixture
def study():
    found = [Fidelity.of([picture(c, True), picture(c - 0.002, False)]) for c in (0.95, 0.998, 0.996)]
    weights = [[0.25, 0.25], [0.5, 0.0]]
    maps = [AttentionMap(name, 0, 0, "cat", "cat", -1, (1, 0), weights, []) for name in ("dense", *NAMES)]
    losses = {name: [[0.1, 0.01], [0.001, 0.0]] for name in NAMES}
    pixels = [[[0, 128, 255]] * 2] * 2
    modules = ("blocks.0.attn", "blocks.1.attn")
    tuning = Tuning(
        "Vit", "cosine", 0.995, setting(100, 1.0), setting(80, 0.996, **{modules[0]: NAMES[0]}),
        alone=(setting(80, 0.996, **{modules[0]: NAMES[0]}), setting(80, 0.9, **{modules[1]: NAMES[0]})),
        steps=(setting(60, 0.9, **dict.fromkeys(modules, NAMES[0])), setting(80, 0.996, **{modules[0]: NAMES[0]})),
        modules=modules,
    )  # fmt: skip
    return ConversionStudy(
        settings={"model": "vit_<tiny>", "size": 28, "tokens": 1025, "tune": 0.995},
        environment=Environment("cpu", 2, 2, "avx2", "cpu", "3.11", "2.11", "1.0", "0.1.0", "abc", "2026-01-01T00:00"),
        models=[
            model("dense", 1.0),
            model(NAMES[0], 1.5, found[0]),
            model(NAMES[1], 1.01, found[1], memory=None),
            model(NAMES[2], 0.8, found[2]),
        ],
        photos=[ConvertedPhoto("cat & dog", pixels, maps, losses), ConvertedPhoto("none", pixels)],
        tuning=tuning,
        notes=["A note."],
        command="regard convert vit",
    )


def test_the_headline_tells_faster_level_and_slower(study):
    faster, level, slower = conversion_headline(study)
    assert faster.startswith("knn(topk=0.25): 1.50x faster than dense attention at 1,025 tokens")
    assert "as fast as dense attention within the spread" in level
    assert "1.25x slower" in slower and "a cosine of 0.9950 (0.9850 centred)" in slower


def test_the_table_tells_losses_as_losses_and_what_is_missing(study):
    dense, knn, multipole, tuned = conversion_table(study).rows
    assert [cell.text for cell in dense[5:]] == ["–"] * 5 and dense[2].text == "baseline"
    assert (knn[2].tone, multipole[2].tone, tuned[2].tone) == ("win", "", "loss")
    assert multipole[4].text == "–" and knn[4].text == "12 MB"
    assert (knn[5].text, knn[5].note) == ("0.9490", "0.9480") and knn[-1].text == "50"
    assert knn[0].note == "1 of 2 modules left"


def test_without_a_classifier_there_is_no_column_for_it(study):
    for one in study.models[1:]:
        one.fidelity = dataclasses.replace(one.fidelity, top1_agreement=None)
    assert "same top-1" not in [column.heading for column in conversion_table(study).columns]


def test_the_page_has_its_parts_and_escapes_what_comes_from_outside(study, tmp_path):
    page, data = write_conversion_report(study, tmp_path / "out")
    text = page.read_text()
    assert ConversionStudy.from_json(data.read_text()) == study
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[:4] == [
        "Speed, memory, fidelity",
        "Tuned, layer by layer",
        "Who looks at whom",
        "Where the features change",
    ]
    assert "vit_<tiny>" not in text and "vit_&lt;tiny&gt;" in text and "pool.&lt;b&gt;" in text
    assert len(re.findall("<svg", text)) == 3 and "<script" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_a_study_without_maps_tuning_and_layers_has_a_page(study):
    bare = dataclasses.replace(study, photos=[], tuning=None)
    text = render_conversion(bare)
    assert "<svg" not in text and "Who looks at whom" not in text and "Tuned" not in text


def test_the_terminal_needs_80_columns(study):
    console = Console(width=80, record=True, file=io.StringIO())
    for one in study.models[1:]:
        one.layers = {"blocks.0.attn": 0.98765}
    console.print(conversion_terminal(study))
    said = console.export_text()
    assert "…" not in said and "0.9877" in said and "1.50x faster" in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_trade_off_marks_what_was_undone(study):
    axes = trade_off(study.tuning).axes[0]
    held, undone, target = axes.get_lines()
    assert list(held.get_xdata()) == [100.0, 80.0] and list(undone.get_xdata()) == [60.0]
    assert set(target.get_ydata()) == {0.995}
