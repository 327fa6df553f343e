"""What holds for every family: all keys is the model, half the keys is the oracle, restoring leaves no trace."""

import copy
import pickle
import warnings

import pytest
import torch
from model_families import FAMILIES, built, fresh, images_for, output_of, parametrised
from selecting import selecting

import regard
from regard.conversion.seam import Seam

# float64 throughout: what differs beyond its rounding differs in its equations
EXACT = {"rtol": 1e-9, "atol": 1e-9}

pytestmark = pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")


def seams(model):
    return [module for module in model.modules() if isinstance(vars(module).get("forward"), Seam)]


def everything_in(model):
    """All attributes of all modules by identity, and what their containers hold."""
    return {
        name: {
            key: (id(value), {k: id(v) for k, v in value.items()} if isinstance(value, dict) else None)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


@parametrised(*FAMILIES)
def test_the_record_tells_what_is_converted_and_why_the_rest_is_left(name):
    family = FAMILIES[name]
    model = fresh(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        record = regard.convert(model, "knn(topk=2)", example_inputs=images_for(name))
    assert len(record.converted) == family.converted == len(seams(model))
    assert bool(record.converted) or any("nothing was converted" in str(one.message) for one in told)
    assert all(row.tokens > 1 and row.keys > 1 and row.mechanism == "knn(topk=2)" for row in record.converted)
    assert {row.kind for row in record.left} == set(family.left)
    for row in record.left:
        assert family.left[row.kind] in row.reason
    modules = dict(model.named_modules())
    prefix = tuple(modules[row.module].forward.layout.num_prefix_tokens for row in record.converted)
    assert prefix == (family.prefix or (0,) * family.converted)


@parametrised()
def test_all_keys_equals_the_model(name):
    model, images = built(name), torch.cat((images_for(name), images_for(name, seed=2)))
    with torch.no_grad():
        expected = output_of(model, images)
        with regard.converted(model, "knn(topk=1.0)", example_inputs=images_for(name)):
            torch.testing.assert_close(output_of(model, images), expected, **EXACT)


@parametrised()
def test_half_of_the_keys_equals_the_oracle(name):
    """Biases are added and masks obeyed before keys are chosen, and the gradient of both flows through the chosen."""
    model, images = fresh(name), images_for(name)
    with regard.converted(model, "knn(topk=0.5)", example_inputs=images) as record:
        ours = output_of(model, images)
        ours.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model = fresh(name)
    with selecting(model, 0.5, {row.module for row in record.left}):
        expected = output_of(model, images)
        expected.square().mean().backward()
    torch.testing.assert_close(ours, expected, **EXACT)
    with torch.no_grad():
        assert not torch.allclose(ours, output_of(model, images), rtol=1e-3, atol=1e-3), "half of the keys is no choice"
    for parameter_name, parameter in model.named_parameters():
        found, wanted = gradients[parameter_name], parameter.grad
        if wanted is None or found is None:  # talking heads: a constant on all logits moves nothing
            assert found is None
            assert wanted is None or wanted.abs().max() < 1e-9
        else:
            scale = wanted.abs().max().clamp(min=1.0)
            torch.testing.assert_close(
                found / scale, wanted / scale, **EXACT, msg=lambda t, n=parameter_name: f"{n}: {t}"
            )


@parametrised()
def test_restore_is_bit_identical_and_leaves_no_trace(name):
    model, images = fresh(name), images_for(name)
    with torch.no_grad():
        before = output_of(model, images)
    found, state = everything_in(model), torch.random.get_rng_state()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    regard.convert(model, "knn(topk=0.5)", example_inputs=images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(model.state_dict()) == list(values)
    with torch.no_grad():
        assert not torch.equal(output_of(model, images), before)
    regard.restore(model)
    assert everything_in(model) == found
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(output_of(model, images), before)


@parametrised()
def test_copies_and_pickles_stand_on_their_own(name):
    model, images = fresh(name), images_for(name)
    regard.convert(model, "knn(topk=0.5)", example_inputs=images)
    with torch.no_grad():
        expected = output_of(model, images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(module.forward.module is module for module in seams(other))
            for parameter in model.parameters():
                parameter.neg_()  # the other must not look at this one
            assert torch.equal(output_of(other, images), expected)
            for parameter in model.parameters():
                parameter.neg_()
            other.load_state_dict(model.state_dict())
            assert torch.equal(output_of(other, images), expected)
            regard.restore(other)
            assert not seams(other) and seams(model)
            assert torch.equal(output_of(other, images), output_of(built(name), images))


@parametrised(*(name for name, family in FAMILIES.items() if family.names_size is False))
def test_models_that_name_no_size_ask_for_inputs(name):
    model = fresh(name)
    found = everything_in(model)
    with pytest.raises(ValueError, match="example_inputs"):
        regard.convert(model, "knn")
    assert everything_in(model) == found


@parametrised(*(name for name, family in FAMILIES.items() if family.names_size and family.converted))
def test_models_that_name_their_size_need_no_inputs(name):
    model = fresh(name)
    with regard.converted(model, "knn") as record:
        assert len(record.converted) == FAMILIES[name].converted
    assert "the size from model" in record.inputs
