"""The keep rate in training."""

import math

import pytest
import torch

from regard.reduction import KeepRateSchedule, reorganize


def test_rates_of_the_published_schedule():
    schedule = KeepRateSchedule(steps_per_epoch=10)
    assert [schedule.rate(step, 0.7) for step in (0, 99)] == [1.0, 1.0]
    assert schedule.rate(100, 0.7) == pytest.approx(1.0)
    assert schedule.rate(600, 0.7) == pytest.approx(0.85)  # half way: epoch 10 + 50
    assert schedule.rate(350, 0.7) == pytest.approx(0.7 + 0.3 * (1 + math.cos(math.pi / 4)) / 2)
    assert [schedule.rate(step, 0.7) for step in (1100, 5000)] == [0.7, 0.7]
    rates = [schedule.rate(step, 0.7) for step in range(1200)]
    assert rates == sorted(rates, reverse=True)


def test_no_epochs_to_fall_is_a_jump():
    schedule = KeepRateSchedule(steps_per_epoch=10, start_epoch=2, epochs=0)
    assert [schedule.rate(step, 0.7) for step in (19, 20)] == [1.0, 0.7]
    assert KeepRateSchedule(steps_per_epoch=10, start_epoch=0, epochs=0).rate(0, 0.7) == 0.7


def test_training_follows_and_evaluation_does_not(vit, images):
    reorganize(vit, (0.5, 0.8), (1, 2))
    schedule = KeepRateSchedule(steps_per_epoch=4, start_epoch=1, epochs=2)
    with torch.no_grad():
        for step, trained in ((0, 17), (4, 17), (8, 1 + 12 + 1), (12, 1 + 8 + 1)):
            schedule.update(vit, step)
            seen = []
            hook = vit.blocks[1].register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.shape[1]))
            vit.train()(images)
            vit.eval()(images)
            hook.remove()
            assert seen == [trained, 1 + 8 + 1]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"steps_per_epoch": 0}, ValueError),
        ({"steps_per_epoch": 1.5}, TypeError),
        ({"steps_per_epoch": 1, "epochs": -1}, ValueError),
        ({"steps_per_epoch": 1, "start_epoch": -1}, ValueError),
    ],
)
def test_bad_schedules_are_refused(options, error):
    with pytest.raises(error, match=list(options)[-1]):
        KeepRateSchedule(**options)


def test_a_model_without_reorganized_layers_is_refused(vit):
    with pytest.raises(ValueError, match="call reorganize"):
        KeepRateSchedule(steps_per_epoch=1).update(vit, 0)
