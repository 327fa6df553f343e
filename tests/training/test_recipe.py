import dataclasses

import pytest

from regard.training import Recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("label_smoothing", 1.5),
        ("shift", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*got {value}"):
        Recipe(**{field: value})


def test_a_recipe_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().epochs = 1
