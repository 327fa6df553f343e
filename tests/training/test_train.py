"""Runs: paired by seed, repeatable, and ended with a reason when they go wrong."""

import dataclasses
import json
import re

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from regard.mixers import parse_mechanism
from regard.results import TrainingRun, to_json
from regard.training import Recipe, train

DENSE, ALL_KEYS, HALF = (parse_mechanism(one) for one in ("dense", "knn(topk=1.0)", "knn(topk=0.5)"))


def initial(mechanism, data, recipe, seed):
    """Every weight as it stands before the first step."""
    seen = []

    def keep(optimizer, args, kwargs):
        seen.append([one.detach().clone() for group in optimizer.param_groups for one in group["params"]])

    handle = register_optimizer_step_pre_hook(keep)
    try:
        train(mechanism, data=data, recipe=recipe, seed=seed)
    finally:
        handle.remove()
    return dict(enumerate(seen[0]))


def losses(mechanism, data, recipe, seed=0):
    seen = []
    run, net = train(mechanism, data=data, recipe=recipe, seed=seed, on_step=lambda step, loss: seen.append(loss))
    return seen, run, net.state_dict()


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_one_seed_gives_all_mechanisms_the_same_weights(tiny, short):
    dense, knn, other = (initial(one, tiny, short, seed) for one, seed in ((DENSE, 3), (HALF, 3), (DENSE, 4)))
    assert same(dense, knn)
    assert not same(dense, other)


def test_all_keys_train_like_dense(tiny, short):
    recipe = dataclasses.replace(short, flip=True, shift=0.2)
    dense, _, dense_weights = losses(DENSE, tiny, recipe)
    knn, _, knn_weights = losses(ALL_KEYS, tiny, recipe)
    assert len(dense) == len(knn) == 2 and knn == pytest.approx(dense, rel=1e-4)
    for name, value in dense_weights.items():
        # AdamW divides by the gradient's size, so that a gradient of rounding errors alone moves a weight by the rate.
        torch.testing.assert_close(knn_weights[name], value, rtol=1e-3, atol=recipe.learning_rate / 2, msg=name)


def test_fewer_keys_train_differently(tiny, short):
    assert losses(HALF, tiny, short)[0] != pytest.approx(losses(DENSE, tiny, short)[0], rel=1e-6)


def test_a_seed_repeats_and_another_differs(tiny, short):
    recipe = dataclasses.replace(short, flip=True, shift=0.2)
    first, run, weights = losses(HALF, tiny, recipe, seed=5)
    torch.manual_seed(99)  # the caller's random state is no input
    again, second_run, second_weights = losses(HALF, tiny, recipe, seed=5)
    assert first == again and run.test_correct == second_run.test_correct and same(weights, second_weights)
    assert losses(HALF, tiny, recipe, seed=6)[0] != first


def test_the_random_state_is_restored(tiny, short):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(DENSE, data=tiny, recipe=short)
    assert torch.get_rng_state().equal(before)


def test_the_run_is_filled(tiny):
    records, steps = [], []
    run, net = train(
        HALF,
        data=tiny,
        recipe=Recipe(epochs=2, batch_size=10),
        seed=2,
        on_epoch=records.append,
        on_step=lambda step, loss: steps.append(step),
    )
    assert (run.mechanism, run.seed, run.model, run.data) == ("knn(topk=0.5)", 2, "vit", "tiny")
    assert run.recipe == dataclasses.asdict(Recipe(epochs=2, batch_size=10))
    assert run.parameters == sum(one.numel() for one in net.parameters())
    assert run.forward_flops > 0
    assert [one.epoch for one in run.epochs] == [1, 2] and run.epochs == records
    assert 0 < run.epochs[0].seconds < run.epochs[1].seconds
    assert steps == [1, 2, 3, 4, 5, 6], "24 images in batches of 10: the last, smaller batch counts"
    assert len(run.test_correct) == 10 and run.accuracy == sum(run.test_correct) / 10
    assert run.train_images_per_second > 0 and run.test_images_per_second > 0
    assert run.finished and not run.failure
    assert not net.training


def test_test_correct_is_what_the_model_says(tiny, short):
    run, net = train(DENSE, data=tiny, recipe=short)
    with torch.no_grad():
        expected = net.eval()(tiny.normalise(tiny.test_images)).argmax(-1) == tiny.test_labels
    assert run.test_correct == expected.tolist()


def test_it_learns(tiny):
    run, _ = train(DENSE, data=tiny, recipe=Recipe(epochs=8, batch_size=8))
    assert run.epochs[-1].train_loss < run.epochs[0].train_loss and run.accuracy == 1.0


def test_flops_are_those_of_one_image(tiny, short):
    run, net = train(DENSE, data=tiny, recipe=short)
    tokens, width, depth = net.patch_embed.num_patches, net.embed_dim, len(net.blocks)
    weights = sum(one.weight.numel() for one in net.blocks.modules() if isinstance(one, torch.nn.Linear))
    blocks = 2 * tokens * weights + 4 * tokens**2 * width * depth
    assert blocks < run.forward_flops < 2 * blocks, "the rest is the stem and the head"


def test_there_and_back_through_json(tiny, short):
    run, _ = train(HALF, data=tiny, recipe=short)
    assert TrainingRun.from_dict(json.loads(to_json(dataclasses.asdict(run)))) == run


def rates(data, recipe):
    """The learning rate at each step of a run."""
    seen = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(optimizer.param_groups[0]["lr"])
    )
    try:
        train(DENSE, data=data, recipe=recipe)
    finally:
        handle.remove()
    return seen


def test_the_schedule_wastes_no_step(tiny):
    peak = 1e-3
    seen = rates(tiny, Recipe(epochs=5, batch_size=6, warmup=0.2, learning_rate=peak))
    assert len(seen) == 20 and min(seen) > 0
    assert seen[:5] == pytest.approx([peak * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)])
    assert seen[4:] == sorted(seen[4:], reverse=True) and seen[-1] < 0.02 * peak
    assert seen[12] == pytest.approx(peak / 2), "halfway through the cosine"


@pytest.mark.parametrize("warmup", [0.0, 0.01])
def test_without_warmup_the_first_step_has_the_peak(tiny, warmup):
    seen = rates(tiny, Recipe(epochs=1, batch_size=6, warmup=warmup, learning_rate=1e-3))
    assert seen[0] == 1e-3 and min(seen) > 0


@pytest.mark.parametrize("warmup", [0.0, 0.99])
def test_a_single_step_trains(tiny, warmup):
    assert rates(tiny, Recipe(epochs=1, batch_size=24, warmup=warmup, learning_rate=1e-3)) == [1e-3]


def test_a_loss_that_is_not_finite_ends_the_run(tiny):
    recipe = Recipe(epochs=9, batch_size=6, optimizer="sgd", learning_rate=1e30, warmup=0.0)
    with pytest.raises(
        FloatingPointError, match=re.escape("knn(topk=0.5), seed 8: the loss became ") + ".* in epoch 1"
    ):
        train(HALF, data=tiny, recipe=recipe, seed=8)


def test_an_output_that_is_not_finite_ends_the_run(tiny):
    """The last step of an epoch ruins the weights: no later loss tells."""
    recipe = Recipe(epochs=1, batch_size=24, optimizer="sgd", learning_rate=1e38, warmup=0.0)
    with pytest.raises(FloatingPointError, match="dense, seed 8: the output .* after epoch 1"):
        train(DENSE, data=tiny, recipe=recipe, seed=8)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used(tiny, short, device):
    with pytest.raises(ValueError, match=f"device: '{device}'"):
        train(DENSE, data=tiny, recipe=short, device=device)


def test_an_unknown_model(tiny, short):
    with pytest.raises(ValueError, match="model: unknown name 'vti'; allowed are vit"):
        train(DENSE, data=tiny, recipe=short, model="vti")


def test_a_model_without_attn_layer(tiny, short):
    with pytest.raises(ValueError, match="model: .*'resnet18'.*dense"):
        train(DENSE, data=tiny, recipe=short, model="resnet18")


def test_an_unknown_optimizer(tiny):
    with pytest.raises(ValueError, match="optimizer: .*'adamx'"):
        train(DENSE, data=tiny, recipe=Recipe(optimizer="adamx"))


@pytest.mark.parametrize("callback", ["on_step", "on_epoch"])
def test_ctrl_c_passes_through(tiny, short, callback):
    def stop(*_):
        raise KeyboardInterrupt

    torch.manual_seed(7)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        train(DENSE, data=tiny, recipe=short, **{callback: stop})
    assert torch.get_rng_state().equal(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tiny, short):
    state = torch.cuda.get_rng_state()
    run, net = train(HALF, data=tiny, recipe=short, device="cuda")
    assert run.finished and next(net.parameters()).is_cuda and torch.cuda.get_rng_state().equal(state)
