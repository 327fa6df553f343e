"""Mechanisms as values: one text form that reads back as it was written."""

import dataclasses
import pickle

import pytest

from regard.mixers import KNN, Dense, Gated, mechanisms, modifiers, parse_mechanism
from regard.specs import Composed, Mechanism, nearest


@pytest.mark.parametrize("name", mechanisms())
def test_text_form_reads_back(name):
    default = mechanisms()[name]()
    assert parse_mechanism(name) == parse_mechanism(str(default)) == default
    assert parse_mechanism(default) is default
    assert default.name == name == default.card.name
    assert pickle.loads(pickle.dumps(default)) == default
    assert len({default, parse_mechanism(name)}) == 1


@pytest.mark.parametrize("name", mechanisms())
def test_values_are_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        mechanisms()[name]().anything = 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("dense", Dense()),
        ("dense()", Dense()),
        (" knn ", KNN()),
        ("knn(topk=9)", KNN(topk=9)),
        ("knn(topk=0.25)", KNN(topk=0.25)),
        ("knn( topk = 1.0 )", KNN(topk=1.0)),
    ],
)
def test_parse(text, value):
    assert parse_mechanism(text) == value


def test_one_key_and_all_keys_stay_apart():
    one, every = parse_mechanism("knn(topk=1)"), parse_mechanism("knn(topk=1.0)")
    assert (str(one), str(every)) == ("knn(topk=1)", "knn(topk=1.0)")
    assert isinstance(one.topk, int) and isinstance(every.topk, float)
    assert one != every and len({one, every}) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("knm", r"unknown name 'knm' in 'knm'; known: knn"),
        ("knn(top=3)", r"'knn' has no option 'top' in 'knn\(top=3\)'; its options: topk"),
        ("dense(topk=3)", "'dense' has no option 'topk' .*; its options: none"),
        ("knn(topk=0)", "topk: a row keeps at least one key, got 0"),
        ("knn(topk=1.5)", r"topk: as a fraction it must lie in \(0, 1\], got 1.5"),
        ("knn(3)", "cannot read 'knn\\(3\\)'; write a name with keyword options"),
        ("knn(topk=three)", "cannot read"),
        ("knn(topk=3", "cannot read"),
        ("knn(**{'topk': 3})", "cannot read"),
        ("knn; import os", "cannot read"),
        ("__import__('os').system('true')", "cannot read"),
        ("", "cannot read"),
        ("\0", "cannot read"),
    ],
)
def test_bad_text(text, said):
    with pytest.raises(ValueError, match=said):
        parse_mechanism(text)


@pytest.mark.parametrize("given", [None, 3, KNN, ["knn"]])
def test_neither_text_nor_mechanism(given):
    with pytest.raises(TypeError, match="mechanism: expected text such as"):
        parse_mechanism(given)


@pytest.mark.parametrize("topk", ["half", None, True])
def test_wrong_type_of_option(topk):
    with pytest.raises(TypeError, match="topk"):
        parse_mechanism(f"knn(topk={topk!r})")


def test_nearest_puts_the_most_alike_first():
    assert nearest("kn", ["dense", "knn", "clustered"])[0] == "knn"
    assert sorted(nearest("x", ["a", "b"])) == ["a", "b"]


def test_mechanisms_returns_a_copy():
    mechanisms().clear()
    assert mechanisms()["knn"] is KNN and issubclass(KNN, Mechanism)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("dense", "dense"),
        ("knn", "knn"),
        ("knn(topk=0.5)", "knn"),
        ("knn(topk=1)", "knn(topk=1)"),
        ("multipole(near=3, far='gaussian')", "multipole(near=3, far='gaussian')"),
        ("multipole(iterations=2)", "multipole"),
    ],
)
def test_a_label_drops_what_is_default(text, label):
    mechanism = parse_mechanism(text)
    assert mechanism.label == label and parse_mechanism(label) == mechanism


@pytest.mark.parametrize("name", modifiers())
def test_a_modifier_alone_is_put_around_dense_attention(name):
    modifier = modifiers()[name]()
    mechanism = parse_mechanism(name)
    assert isinstance(mechanism, Composed) and mechanism == Dense() + modifier == parse_mechanism(modifier)
    assert str(mechanism) == f"dense + {modifier}" and parse_mechanism(str(mechanism)) == mechanism
    assert pickle.loads(pickle.dumps(mechanism)) == mechanism
    assert mechanism.label == f"dense + {name}" and mechanism.name == f"dense + {name}"
    assert not mechanism.converts and modifier.card.modifies


def test_composition():
    mechanism = KNN(topk=3) + Gated("headwise")
    assert str(mechanism) == "knn(topk=3) + gated(kind='headwise')"
    assert parse_mechanism("knn( topk=3 )+gated(kind='headwise')") == mechanism != KNN(topk=3)
    with pytest.raises(ValueError, match="changes the model, not only its attention; attend with 'knn"):
        mechanism.attend(None, None, None)
    with pytest.raises(TypeError):
        KNN() + 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("knn + dense", "'knn \\+ dense' adds 'dense'; only modifiers are added: .*gated"),
        ("gated + knn", "adds 'knn'"),
        ("knn + gated + gated", "'gated' is given twice"),
        ("knn - gated", "cannot read"),
        ("knn + gatd", "unknown name 'gatd' in 'knn \\+ gatd'; known: gated"),
        ("knn + gated(kind='both')", "kind: expected one of elementwise, headwise, got 'both'"),
        ("gated(kin='headwise')", "'gated' has no option 'kin'"),
    ],
)
def test_bad_composition(text, said):
    with pytest.raises(ValueError, match=said):
        parse_mechanism(text)
