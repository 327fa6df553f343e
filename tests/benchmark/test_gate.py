"""The gate is green on the operator and red on every kind of fault that it is there to find."""

import dataclasses

import pytest
import torch

from regard.benchmark import gate
from regard.benchmark.gate import Judgement, check_knn, error_budget, judge_selection, own_selection
from regard.benchmark.peers import published_knn_attention
from regard.ops._selection import kept_by_stable_sort
from regard.ops.knn.api import OPERATOR
from regard.ops.knn.call import KNNCall
from regard.ops.knn.reference import knn_attention_reference, logits, weights


def normal(*size, dtype=torch.float32, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(count)]


def call_of(query, key, value, topk):
    return KNNCall(query, key, value, None, topk, 0.0, False, query.shape[-1] ** -0.5)


class Faulty:
    """Stands in for the dispatcher's operator and runs `function(call)`."""

    def __init__(self, function):
        self.run = function
        self.bind, self.choose = OPERATOR.bind, OPERATOR.choose


def judged(monkeypatch, function, topk=10, dtype=torch.float32, backward=True):
    monkeypatch.setattr(gate, "OPERATOR", Faulty(function))
    return check_knn(*normal(1, 2, 40, 16, dtype=dtype), topk=topk, backward=backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [1, 10, 0.5, 1.0])
def test_operator_is_green(dtype, topk):
    result = check_knn(*normal(2, 2, 61, 16, dtype=dtype), topk=topk)
    assert result.passed, str(result)
    assert [one.name for one in result.judgements] == ["output", "grad_query", "grad_key", "grad_value"]
    assert result.rows == 122 and result.dtype == str(dtype).removeprefix("torch.")


def test_more_keys_than_one_probe_takes():
    query, key, value = normal(1, 1, 300, 8)
    assert check_knn(query[:, :, :20], key, value, topk=33).passed


def test_masks_causality_and_grouped_heads():
    query, key, value = normal(2, 4, 30, 16)
    key, value = key[:, :2], value[:, :2]
    hidden = torch.rand(1, 4, 30, 30, generator=torch.Generator().manual_seed(1)) > 0.5
    hidden[:, :, 3] = False
    bias = torch.randn(2, 1, 30, 30, generator=torch.Generator().manual_seed(2))
    for options in ({"attn_mask": hidden}, {"attn_mask": bias}, {"is_causal": True}, {"scale": 0.7}):
        result = check_knn(query, key, value, topk=7, enable_gqa=True, units=4, **options)
        assert result.passed, f"{sorted(options)}: {result}"
        assert result.rows == 2 * 4 * 30


def test_ties_and_large_logits_are_green():
    query, key, value = normal(1, 1, 32, 8)
    assert check_knn(query, key.repeat(1, 1, 2, 1), value.repeat(1, 1, 2, 1), topk=13).passed
    # Nearly all weights underflow: kept keys that cannot be seen are no fault.
    assert check_knn(query * 1000, key, value, topk=16).passed


def test_keeping_the_wrong_key_is_red(monkeypatch):
    def select(scores, topk):
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        order = torch.cat(
            [order[..., : topk - 1], order[..., topk : topk + 1]], dim=-1
        )  # the k-th for the one behind it
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)

    result = judged(monkeypatch, lambda call: knn_attention_reference(call, select))
    assert not result.passed and result.dropped_excess > 0
    assert result.miscounted_rows == 0 and all(one.passed for one in result.judgements)


@pytest.mark.parametrize("more", [-1, 1])
def test_keeping_the_wrong_number_is_red(monkeypatch, more):
    def run(call):
        return knn_attention_reference(dataclasses.replace(call, topk=call.topk + more))

    result = judged(monkeypatch, run)
    assert not result.passed and result.miscounted_rows == result.rows


def test_output_off_by_three_units_is_red(monkeypatch):
    result = judged(monkeypatch, lambda call: knn_attention_reference(call) * (1 + 2**-18))
    assert not result.passed and result.dropped_excess <= 0
    assert not result.judgements[0].passed


def test_half_precision_inside_is_red(monkeypatch):
    """Weights rounded to bfloat16 are not float32's error."""

    def run(call):
        return torch.einsum("bhnm,bhmd->bhnd", weights(call).bfloat16().float(), call.value)

    assert not judged(monkeypatch, run, backward=False).passed


def test_wrong_gradient_is_red(monkeypatch):
    def run(call):
        key = call.key * 0.999 + (call.key * 0.001).detach()
        return knn_attention_reference(dataclasses.replace(call, key=key))

    result = judged(monkeypatch, run)
    assert [one.name for one in result.judgements if not one.passed] == ["grad_key"]


def test_nan_is_red(monkeypatch):
    def run(call):
        output = knn_attention_reference(call)
        return torch.where(torch.arange(output.shape[-2]).unsqueeze(-1) == 5, output * float("nan"), output)

    assert not judged(monkeypatch, run, backward=False).passed


def test_near_ties_may_fall_either_way():
    """Two logits one rounding apart: either may be kept, neither may push out one that is clearly larger."""
    query = torch.ones(1, 1, 1, 8)
    key = torch.tensor([3.0, 1.0, 1.0 + 2**-23, -1.0]).reshape(1, 1, 4, 1).expand(1, 1, 4, 8) / 8
    call = call_of(query, key, key, 2)
    for pair, right in (((0, 1), True), ((0, 2), True), ((1, 2), False), ((0, 3), False)):
        kept = torch.zeros(1, 1, 1, 4, dtype=torch.bool)
        kept[..., list(pair)] = True
        excess, miscounted = judge_selection(call, kept)
        assert (excess <= 0) == right, pair
        assert miscounted == 0


def test_own_selection_is_the_references():
    query, key, value = normal(1, 2, 25, 16)
    call = call_of(query, key, value, 6)
    assert torch.equal(own_selection(call), kept_by_stable_sort(logits(call), 6))


def test_error_budget():
    exact = torch.tensor([1.5, -3.0], dtype=torch.float64)
    assert error_budget(exact, exact.float()) == 2 * torch.finfo(torch.float32).eps  # -3 lies in [2, 4)
    assert error_budget(exact, (exact + torch.tensor([0.0, 0.25])).float()) == 0.5
    assert error_budget(torch.zeros(3, dtype=torch.float64), torch.zeros(3)) > 0
    assert not Judgement("output", float("nan"), 1.0).passed


def test_what_the_gate_refuses():
    query, key, value = normal(1, 1, 8, 8)
    with pytest.raises(TypeError, match="float64"):
        check_knn(query.double(), key.double(), value.double(), topk=2)
    with pytest.raises(ValueError, match="key: holds NaN"):
        check_knn(query, key * float("nan"), value, topk=2)
    with pytest.raises(ValueError, match="empty"):
        check_knn(query[:, :, :0], key, value, topk=2)
    with pytest.raises(ValueError, match="dropout_p"):
        check_knn(query, key, value, topk=2, dropout_p=0.5)


@pytest.mark.parametrize("topk", [1, 9, 0.25, 1.0])
def test_published_formulation_equals_the_reference(topk):
    query, key, value = normal(2, 3, 40, 16, dtype=torch.float64)
    kept = OPERATOR.bind(query, key, value, topk=topk, scale=0.3)
    expected = knn_attention_reference(kept)
    torch.testing.assert_close(published_knn_attention(query, key, value, topk, 0.3), expected)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    grads = torch.autograd.grad(published_knn_attention(*inputs, topk).sum(), inputs)
    expected_grads = torch.autograd.grad(knn_attention_reference(OPERATOR.bind(*inputs, topk=topk)).sum(), inputs)
    torch.testing.assert_close(grads, expected_grads)
