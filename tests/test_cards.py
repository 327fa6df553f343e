"""Cards: complete, true where a test can tell, and the documentation made from them is up to date."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import regard.backbones  # noqa: F401  (registers the models whose parameters are counted)
from regard.cards import Card, table
from regard.mixers import mechanisms, modifiers

ROOT = Path(__file__).parents[1]
CARDS = [value.card for value in (*mechanisms().values(), *modifiers().values())]


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_card_is_complete(card):
    for name in ("name", "title", "paper", "authors", "venue", "cost", "summary", "equation"):
        assert getattr(card, name), name
    assert card.summary.endswith(".") and card.name.isidentifier()
    assert card.evidence.identities or card.evidence.parity
    assert not card.quirks or card.official


@pytest.mark.parametrize(("name", "count"), [item for card in CARDS for item in card.evidence.parameters.items()])
def test_published_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == count


def test_table():
    text = table(CARDS, pages="docs/mechanisms")
    lines = text.splitlines()
    assert len(lines) == 2 + len(CARDS)
    assert len({line.count(" | ") for line in lines}) == 1
    assert "[`knn`](docs/mechanisms/knn.md)" in text and "https://arxiv.org/abs/2106.00515" in text
    assert "](docs" not in table(CARDS)


def test_table_without_paper_address_and_with_a_bar():
    card = Card("new", "New", "P", "A", "nowhere yet", "", False, "N", True, True, "Keys with |k| > 1.")
    assert r"\|k\|" in table([card]) and "| nowhere yet |" in table([card])


def test_documentation_is_up_to_date():
    done = subprocess.run([sys.executable, "tools/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_notices_what_is_stale(docs, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    assert docs.main(["--check"], tmp_path) == 1
    assert docs.main([], tmp_path) == 0 and docs.main(["--check"], tmp_path) == 0
    text = readme.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("\nafter\n")
        and table(CARDS, pages="docs/mechanisms", short=True) in text
    )
    (tmp_path / "docs" / "mechanisms" / "gone.md").write_text("a mechanism that is no more")
    (tmp_path / "docs" / "mechanisms.md").write_text("edited by hand")
    capsys.readouterr()
    assert docs.main(["--check"], tmp_path) == 1
    told = capsys.readouterr().out
    assert "gone.md" in told and "mechanisms.md" in told and "README" not in told
    assert docs.main([], tmp_path) == 0 and not (tmp_path / "docs" / "mechanisms" / "gone.md").exists()


def test_notes_are_taken_into_the_page(docs, tmp_path):
    (tmp_path / "docs" / "notes").mkdir(parents=True)
    (tmp_path / "docs" / "notes" / "knn.md").write_text("## A note\n")
    assert docs.documents(tmp_path)[tmp_path / "docs" / "mechanisms" / "knn.md"].endswith("\n\n## A note\n")


def test_a_mark_alone_is_refused(docs):
    with pytest.raises(ValueError, match="one of them is missing"):
        docs.with_table(f"text {docs.BEGIN} text", "")
    assert docs.with_table("no marks", "table") == "no marks"
