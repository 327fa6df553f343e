"""The page: whole, self-contained, honest about what is missing."""

import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from markupsafe import escape
from rich.console import Console

from regard.report import render_page, terminal_table, write_report
from regard.report.findings import headline
from regard.report.page import JSON_NAME, PAGE_NAME
from regard.report.picture import summary_picture, write_picture
from regard.results import Comparison

HEADINGS = ["Summary", "Accuracy", "Cost and accuracy", "Cost of the operator", "Who looks at whom"]
HEADINGS += ["How it was measured", "Settings, versions, machine", "Reproduce"]
VOID = {"meta", "link", "br", "img"}


class Balanced(HTMLParser):
    """Fails on tags that do not close in order; collects headings and ids."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.headings = [], [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def parsed(page):
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    return parser


def test_the_page_holds_every_part_in_order_and_no_id_twice(comparison):
    found = parsed(render_page(comparison))
    assert found.headings == HEADINGS
    assert len(found.ids) == len(set(found.ids)) > 0


def test_the_page_asks_nothing_of_the_network(comparison):
    page = render_page(comparison)
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "<script" not in page and "@import" not in page


def test_every_reference_inside_a_figure_has_its_target(comparison):
    page = render_page(comparison)
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= ids


def test_figures_are_xml_and_follow_the_theme(comparison):
    page = render_page(comparison)
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 9
    for figure in figures:
        root = ET.fromstring(figure)
        assert "viewBox" in root.attrib and "width" not in root.attrib
    assert "var(--ink)" in figures[0] and "DejaVu" not in page


def test_text_from_outside_is_escaped(comparison):
    comparison.settings["data"] = "<script>alert(1)</script>"
    comparison.maps[0].label = "<b>Coat & Co</b>"
    comparison.maps[3].label = comparison.maps[4].prediction = r"$\frac{ $"
    page = render_page(comparison)
    assert "<script" not in page and "<b>Coat" not in page


def test_an_interrupted_comparison_says_so_and_marks_what_is_missing(comparison):
    comparison.interrupted = True
    comparison.runs[-1].finished = False
    comparison.costs, comparison.crossovers, comparison.maps = [], [], []
    page = render_page(comparison)
    parsed(page)
    assert "Stopped before the end." in page
    assert "knn(topk=0.125): 2 of 3 runs finished." in page
    assert "The operators&#39; cost was not measured." in page
    assert "Who looks at whom" not in page


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_few_runs_still_make_a_page(comparison, runs):
    comparison.runs = comparison.runs[:runs]
    comparison.costs = comparison.costs[:1]
    comparison.maps = comparison.maps[:1]
    parsed(render_page(comparison))


def test_a_failed_run_is_told(comparison):
    comparison.runs[1].finished, comparison.runs[1].failure = False, "the loss became NaN in epoch 2"
    assert "the loss became NaN in epoch 2" in render_page(comparison)


def test_write_report_writes_page_and_json(comparison, tmp_path):
    page, data = write_report(comparison, tmp_path / "new" / "folder")
    assert (page.name, data.name) == (PAGE_NAME, JSON_NAME)
    assert Comparison.from_json(data.read_text()) == comparison
    assert sorted(one.name for one in page.parent.iterdir()) == sorted([PAGE_NAME, JSON_NAME])


def test_labels_stand_for_long_mechanisms(comparison):
    long = "multipole(num_clusters=None, near=0.1, far='centroid', iterations=2)"
    other = Comparison.from_json(comparison.to_json().replace("knn(topk=0.5)", long))
    other.labels = {long: "multipole", "dense": "dense"}
    other.command = f"regard compare --mechanisms '{long}'"
    page = render_page(other)
    assert f"multipole stands for {escape(long)}." in page
    assert page.count(str(escape(long))) == 2  # the note and the command
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(other), *headline(other))
    said = console.export_text()
    assert "multipole" in said and "iterations" not in said
    assert long in other.to_json() and "stands for" not in other.to_json()  # what is stored is untouched


def test_the_terminal_breaks_long_mechanisms_between_their_options(comparison):
    long = "multipole(num_clusters=None, near=0.1, far='centroid', iterations=2)"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(Comparison.from_json(comparison.to_json().replace("knn(topk=0.5)", long))))
    said = console.export_text()
    for part in ("multipole(", "near=0.1,", "far='centroid',", "iterations=2)", "412,042", "1.77x faster"):
        assert part in said
    assert "…" not in said and max(map(len, said.splitlines())) <= 80


def test_the_terminal_table_fits_80_columns_with_nothing_cut(comparison):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(comparison))
    text = console.export_text()
    assert "…" not in text
    for expected in ("knn(topk=0.125)", "80.1 ± 0.6", "−1.0 ± 0.2", "less accurate", "1.77x faster", "412,042"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80


def test_many_mechanisms_keep_apart(comparison):
    names = ["dense"] + [f"knn(topk={k})" for k in range(1, 15)]
    comparison.settings["mechanisms"] = names
    from regard.report.style import looks

    styles = looks(comparison)
    assert len({(styles[name].color, str(styles[name].dash)) for name in names}) == len(names)
    parsed(render_page(comparison))


def test_the_picture_is_as_wide_as_asked(comparison, tmp_path):
    write_picture(comparison, tmp_path / "images" / "compare.png", width=600)
    from PIL import Image

    with Image.open(tmp_path / "images" / "compare.png") as picture:
        assert picture.width == 600 and len(picture.getcolors(1 << 24)) > 100


def test_the_picture_needs_a_finished_comparison(comparison):
    comparison.maps = []
    with pytest.raises(ValueError, match="attention maps"):
        summary_picture(comparison)
