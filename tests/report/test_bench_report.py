"""What `regard bench` found, as tables, Markdown and a figure."""

import math

import pytest
from PIL import Image
from rich.console import Console

from regard.report.bench import about, bench_figure, bench_markdown, bench_tables, write_bench_report
from regard.results import BenchCell, BenchStudy, BenchTime, Ceiling, Environment, growth_of

HERE = Environment(
    "Test machine", 2, 2, "avx512", "cpu", "3.11.7", "2.15.0", "1.0.31", "0.1.0", "abc1234", "2026-11-21"
)


def cell(tokens: int, seconds: float, direction: str = "forward", passed: bool = True) -> BenchCell:
    own = BenchTime("regard", seconds, 0.9 * seconds, 1.1 * seconds, 9, 1.0, 1.0, 1.0, 5_000_000)
    dense = BenchTime("sdpa", 3 * seconds, 2.9 * seconds, 3.1 * seconds, 9, 3.0, 2.9, 3.1, 80_000_000)
    rare = BenchTime("published", 40 * seconds, 40 * seconds, 40 * seconds, 1, 40.0, 40.0, 40.0)
    late = BenchTime("published", skipped="about 12 s a run; --patience 14 takes it")
    times = [own, dense, rare if tokens < 4000 else late] if passed else []
    gate = "knn_attention (cpu, float32): " + ("green" if passed else "RED; output 2 of 1")
    backend = "pytorch" if direction == "forward" and tokens > 4000 else "cpu"
    cosine = 0.99612 if backend == "pytorch" else math.nan
    shape = ("knn", f"N {tokens:,}, k = N/16", "k = N/16", tokens, 1, 6, 64)
    return BenchCell(*shape, "float32", direction, gate, passed, backend, 2e9, 10_000_000, cosine, times)


@pytest.fixture
def study() -> BenchStudy:
    cells = [cell(1024, 0.01), cell(4096, 0.08), cell(1024, 0.03, "forward+backward", passed=False)]
    ceilings = [Ceiling("float32", 4e11, 2e10)]
    command = "regard bench knn"
    return BenchStudy(
        {"operators": ["knn"]}, HERE, ceilings, cells, growth_of(cells), notes=["A note."], command=command
    )


def drawn(study: BenchStudy, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the process
    console.print(bench_tables(study))
    return console.export_text()


def test_the_table_holds_times_rates_ceilings_memory_and_peers(study):
    text = drawn(study)
    # 2 GFLOP in 10 ms is 200 GFLOP/s, half of the ceiling; 10 MB in 10 ms is 1 GB/s, 5 % of the copy.
    for expected in (
        "N 1,024",
        "k = N/16",
        "10.0",
        "9.00-11.0",
        "200",
        "50 %",
        "copy 5 %",
        "5.0 MB",
        "3.00x",
        "2.90-3.10",
    ):
        assert expected in text, expected
    for expected in ("80 MB", "40.0x", "fwd + bwd, float32", "gate RED", "matrix product 400 GFLOP/s, copy 20.0 GB/s"):
        assert expected in text, expected
    assert text.count("PyTorch path") == 1 and text.count("cosine 0.9961") == 1
    assert "40.0-40.0" not in text  # one round has no spread
    assert "…" not in text


def test_growth_and_what_was_left_out_are_told_below(study):
    text = " ".join(drawn(study).split())
    assert "growth, k = N/16, fwd, float32, N 1,024 to 4,096: regard N^1.50, sdpa N^1.50" in text
    assert "published left out: about 12 s a run; --patience 14 takes it (N 4,096, k = N/16 fwd)" in text
    assert "1 red of 3" in text and "A note." in text


def test_a_stopped_job_says_so(study):
    study.interrupted = True
    assert about(study)[-1] == "Stopped before the end: the same command resumes."


def test_markdown_holds_the_same(study):
    text = bench_markdown(study)
    assert "Made by `regard bench knn`." in text and "## knn" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.count(" | ") for line in table}) == 1
    assert "| N 1,024, k = N/16, fwd, float32 | 10.0, 9.00-11.0, 5.0 MB | 200 | 50 %, copy 5 % |" in text


def test_the_figure_has_a_line_a_contender(study):
    figure = bench_figure(study)
    (axes,) = figure.axes
    lines = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in axes.lines}
    assert (1024, 4096) in lines and lines[(1024,)] == pytest.approx((400.0,))
    texts = {text.get_text() for text in axes.texts}
    assert {"regard", "sdpa"} <= texts
    study.cells = study.cells[1:]
    assert bench_figure(study) is None


def test_report_files(study, tmp_path):
    names = [path.name for path in write_bench_report(study, tmp_path)]
    assert names == ["bench.md", "bench.svg", "bench.png"] == sorted(names, key=names.index)
    assert (tmp_path / "bench.svg").read_text().rstrip().endswith("</svg>")
    assert Image.open(tmp_path / "bench.png").width > 400
    study.cells = study.cells[1:]
    assert [path.name for path in write_bench_report(study, tmp_path / "other")] == ["bench.md"]


def test_a_study_survives_json(study):
    again = BenchStudy.from_json(study.to_json())
    left_out = again.cells[1].times[2]
    assert math.isnan(left_out.seconds) and left_out.skipped.startswith("about 12 s")
    assert again.cells[1].cosine == 0.99612 and math.isnan(again.cells[0].cosine)
    assert again.cells[0].times == study.cells[0].times and again.growth == study.growth and again.environment == HERE
    assert bench_markdown(again) == bench_markdown(study)
    with pytest.raises(ValueError, match="unknown field"):
        BenchStudy.from_json('{"settings": {}, "colour": 1}')
