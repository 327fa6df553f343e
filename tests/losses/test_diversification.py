"""The attention diversification loss: its definition, the official values, and the form without maps."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from regard.losses import attention_diversification, attention_diversification_of

# What guoyongcs/TAPADL at 6e4dbff (main.py) returns for three draws of maps(4, 3, 50, 50) from one generator, seed 0.
OFFICIAL = (0.5277389935566732, 0.5327754367871239, 0.45819257550460046)


def maps(batch=3, heads=2, queries=20, keys=20, generator=None):
    """Rows that differ, and columns that all like."""
    options = {"generator": generator or torch.Generator().manual_seed(0), "dtype": torch.float64}
    own = torch.randn(batch, heads, queries, keys, **options)
    return (1.5 * own + 1.5 * torch.randn(batch, heads, 1, keys, **options)).softmax(-1)


def by_definition(weights, threshold):
    rows = weights.mean(1)
    mean = rows.mean(1, keepdim=True)
    floor = threshold / rows.shape[-1]
    return F.cosine_similarity(rows * (rows > floor), mean * (mean > floor), dim=-1).mean()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 2.0])
def test_is_the_mean_cosine_to_the_thresholded_mean_row(threshold):
    for weights in (maps(), maps(queries=7), maps(batch=1, heads=1)):
        torch.testing.assert_close(attention_diversification(weights, threshold), by_definition(weights, threshold))


def test_equals_the_official_values():
    generator = torch.Generator().manual_seed(0)
    for expected in OFFICIAL:
        found = attention_diversification(maps(4, 3, 50, 50, generator=generator))
        # The official mean over layers divides by their number and 1e-6 more; here that number is 1.
        torch.testing.assert_close(found.item() / (1 + 1e-6), expected, rtol=0, atol=1e-12)


def test_identical_rows_give_one_and_disjoint_rows_less():
    row = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0, 0.0], dtype=torch.float64)
    alike = row.expand(1, 1, 6, 6)
    torch.testing.assert_close(attention_diversification(alike), torch.tensor(1.0).double())
    own = torch.eye(6, dtype=torch.float64)[None, None]
    torch.testing.assert_close(attention_diversification(own, 0.5), torch.tensor(6**-0.5).double())
    assert attention_diversification(own) == 0.0  # each column's mean is 1 / N, which does not exceed 2 / N
    assert attention_diversification(torch.full((1, 1, 6, 6), 1 / 6)) == 0.0


def test_lies_between_zero_and_one():
    for seed in range(20):
        value = attention_diversification(maps(generator=torch.Generator().manual_seed(seed)), threshold=seed / 10)
        assert 0.0 <= value <= 1.0 + 1e-12


def test_one_pictures_loss_is_its_part_of_a_batch():
    weights = maps(batch=4)
    single = torch.stack([attention_diversification(weights[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(single.mean(), attention_diversification(weights))
    assert len(set(single.tolist())) == 4


def heads_of(weights_shape=(2, 3, 23, 8), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(weights_shape, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]


def explicit(query, key, mask=None, is_causal=False, scale=None, keep=None, threshold=1.0):
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    if is_causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), float("-inf"))
    if keep is not None:
        logits = logits.masked_fill(~keep(logits), float("-inf"))
    return attention_diversification(logits.softmax(-1), threshold)


def five_largest(logits):
    return logits >= logits.topk(5).values[..., -1:]


BIAS = torch.randn(1, 3, 23, 23, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SEEN = (torch.rand(2, 1, 23, 23, generator=torch.Generator().manual_seed(6)) > 0.4) | torch.eye(23, dtype=torch.bool)


@pytest.mark.parametrize("block_size", [1, 7, 23, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.7},
        {"attn_mask": SEEN},
        {"attn_mask": SEEN[:, :, :1]},
        {"is_causal": True},
        {"keep": five_largest},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_in_blocks_value_and_gradients_are_the_explicit_forms(options, block_size):
    query, key = heads_of()
    given = {name.removeprefix("attn_"): value for name, value in options.items()}
    expected = explicit(query, key, **given)
    found = attention_diversification_of(query, key, threshold=1.0, block_size=block_size, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert 0.0 < expected < 1.0
    for ours, theirs in zip(
        torch.autograd.grad(found, (query, key)), torch.autograd.grad(expected, (query, key)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
        assert theirs.abs().max() > 1e-6


def test_a_trained_bias_gets_its_gradient():
    query, key = heads_of()
    bias = BIAS.clone().requires_grad_()
    found = attention_diversification_of(query, key, threshold=1.0, attn_mask=bias, block_size=5)
    (ours,), (theirs,) = (
        torch.autograd.grad(loss, bias) for loss in (found, explicit(query, key, bias, threshold=1.0))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_hidden_rows_and_leading_dimensions():
    query, key = heads_of()
    none = SEEN.clone()
    none[:, :, 3] = False
    found = attention_diversification_of(query, key, attn_mask=none)
    assert torch.isfinite(found) and all(torch.isfinite(g).all() for g in torch.autograd.grad(found, (query, key)))
    folded = attention_diversification_of(query[:, None], key[:, None])
    torch.testing.assert_close(folded, attention_diversification_of(query, key))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_judged_in_float32(dtype):
    query, key = (t.detach().to(dtype) for t in heads_of())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_diversification_of(query, key, threshold=1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, attention_diversification_of(query.float(), key.float(), threshold=1.0))


class Held(TorchDispatchMode):
    """The most bytes that tensors made within this context hold at once, by their storages."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.alive[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def test_no_map_is_ever_formed():
    tokens, block = 512, 16
    query, key = heads_of((1, 2, tokens, 4))
    with Held() as held:
        attention_diversification_of(query, key, block_size=block).backward()
    a_map = 2 * tokens * tokens * 8
    assert held.most < a_map / 2  # the explicit form holds several


def test_compiles_as_one_graph():
    torch.compiler.reset()
    query, key = heads_of()

    def loss(query, key):
        return attention_diversification_of(query, key, threshold=1.0, block_size=10)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(query, key)
    torch.testing.assert_close(compiled, loss(query, key))
    (ours,), (theirs,) = (torch.autograd.grad(value, query) for value in (compiled, loss(query, key)))
    torch.testing.assert_close(ours, theirs)


def test_bad_arguments():
    query, key = heads_of()
    with pytest.raises(ValueError, match=r"weights: expected \(batch, heads, queries, keys\), got shape \(20, 20\)"):
        attention_diversification(maps()[0, 0])
    with pytest.raises(TypeError, match="weights: expected a floating tensor"):
        attention_diversification(torch.ones(1, 1, 2, 2, dtype=torch.int64))
    for threshold, error in ((-1.0, ValueError), (float("nan"), ValueError), ("2", TypeError)):
        with pytest.raises(error, match="threshold: "):
            attention_diversification(maps(), threshold)
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        attention_diversification_of(query, key, block_size=0)
    with pytest.raises(ValueError, match="key: 1 heads, the query has 3; use key.repeat_interleave"):
        attention_diversification_of(query, key[:, :1])
