"""Mixture-of-head attention: the gates against their definition, and skipped heads against heads times zero."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from regard.auxiliary import collect_losses
from regard.mixers import DenseAttention, MixtureOfHeadsAttention, MoH
from regard.mixers.moh import HeadRouter, attend_chosen, split_heads

DIM, HEADS, TOKENS = 48, 6, 20


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make(shared=2, routed=2, heads=HEADS, **options):
    mixer = MixtureOfHeadsAttention(DIM, heads, shared=shared, routed=routed, **options).double().eval()
    with torch.no_grad():  # larger than at the start, so that gates differ
        for weight in mixer.router.parameters():
            weight.normal_(std=0.3)
    return mixer


def tokens(batch=3, count=TOKENS, **options):
    return torch.randn(batch, count, DIM, dtype=torch.float64, **options)


def dense_like(mixer):
    dense = DenseAttention(DIM, mixer.num_heads).double().eval()
    dense.load_state_dict({name: weight for name, weight in mixer.state_dict().items() if "router" not in name})
    return dense


def softmax(logits):
    top = max(logits)
    parts = [math.exp(one - top) for one in logits]
    return [one / sum(parts) for one in parts]


def gates_by_definition(router, token):
    """One token's gates, from the paper's equations in plain Python."""
    gates = [1.0] * router.shared
    if router.share is not None:
        gates = [router.shared * one for one in softmax((router.share.weight @ token).tolist())]
    if router.choose is None:
        return gates
    scores = softmax((router.choose.weight @ token).tolist())
    chosen = sorted(range(len(scores)), key=lambda head: (-scores[head], head))[: router.routed]
    total = sum(scores[head] for head in chosen)
    routed = [router.routed * score / total if head in chosen else 0.0 for head, score in enumerate(scores)]
    first, second = (1.0, 1.0)
    if router.weigh is not None:
        first, second = (2 * one for one in softmax((router.weigh.weight @ token).tolist()))
    return [first * one for one in gates] + [second * one for one in routed]


@pytest.mark.parametrize(("shared", "routed"), [(2, 2), (1, 1), (1, 5), (0, 3), (3, 1), (6, 0)])
def test_gates_and_outputs_are_the_definition(shared, routed):
    mixer, x = make(shared, routed), tokens()
    gates = mixer.router(x).gates
    expected = [[gates_by_definition(mixer.router, token) for token in image] for image in x]
    torch.testing.assert_close(gates.transpose(1, 2), torch.tensor(expected, dtype=torch.float64))
    assert ((gates != 0).sum(1) == shared + routed).all()
    dense = dense_like(mixer)
    heads = dense.attend(*dense.heads(x), None, False, None)
    torch.testing.assert_close(mixer(x), mixer.proj((heads * gates[..., None]).transpose(1, 2).flatten(2)))


def test_gates_sum_to_the_weighted_numbers_of_heads():
    mixer, x = make(2, 3), tokens()
    first, second = (2 * (x @ mixer.router.weigh.weight.T).softmax(-1)).unbind(-1)
    torch.testing.assert_close(mixer.router(x).gates.sum(1), 2 * first + 3 * second)
    torch.testing.assert_close(first + second, torch.full_like(first, 2.0))


@pytest.mark.parametrize(("shared", "routed"), [(2, 4), (1, 5), (0, 6), (6, 0)])
def test_router_of_zeros_with_all_heads_is_dense_attention(shared, routed):
    mixer, x = make(shared, routed), tokens()
    assert not torch.allclose(mixer(x), dense_like(mixer)(x))
    for weight in mixer.router.parameters():
        nn.init.zeros_(weight)
    torch.testing.assert_close(mixer(x), dense_like(mixer)(x))


def test_one_head_is_dense_attention():
    """The official code raises with one shared head and no routed one."""
    mixer = make(0.25, 0.5, heads=1)
    assert not list(mixer.router.parameters())
    x = tokens()
    torch.testing.assert_close(mixer(x), dense_like(mixer)(x))


def test_permuting_routed_heads_changes_nothing():
    mixer, x = make(2, 2), tokens()
    before, order = mixer(x), torch.tensor([0, 1, 4, 2, 5, 3])
    with torch.no_grad():
        rows = mixer.qkv.weight.unflatten(0, (3, HEADS, -1))
        mixer.qkv.weight.copy_(rows[:, order].flatten(0, 2))
        mixer.proj.weight.copy_(mixer.proj.weight.unflatten(1, (HEADS, -1))[:, order].flatten(1))
        mixer.router.choose.weight.copy_(mixer.router.choose.weight[order[2:] - 2])
    torch.testing.assert_close(mixer(x), before)


def test_ties_go_to_the_lowest_index():
    router = HeadRouter(DIM, HEADS, 1, 3)
    nn.init.zeros_(router.choose.weight)
    expected = torch.tensor([True, True, True, False, False]).expand(2, TOKENS, -1).transpose(1, 2)
    assert torch.equal(router(torch.randn(2, TOKENS, DIM)).chosen, expected)
    with torch.no_grad():
        router.choose.weight[3:] = router.choose.weight[1] = 0.0
        router.choose.weight[4] = 1.0
    assert torch.equal(router(torch.ones(1, 1, DIM)).chosen[0, :, 0].nonzero().flatten(), torch.tensor([0, 1, 4]))


def masks():
    keys = torch.rand(TOKENS) > 0.3
    return {
        "none": None,
        "keys": keys[None],
        "pairs": torch.rand(3, 1, TOKENS, TOKENS) > 0.4,
        "heads": torch.rand(HEADS, TOKENS, TOKENS) > 0.4,
        "bias": torch.randn(1, HEADS, 1, TOKENS, dtype=torch.float64),
        "biases": torch.randn(3, HEADS, TOKENS, TOKENS, dtype=torch.float64),
    }


@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize(("shared", "routed"), [(2, 2), (0, 1), (1, 4)])
def test_skipped_heads_equal_heads_times_zero(shared, routed, mask):
    """Outputs, and gradients of tokens, weights and biases."""
    mixer = make(shared, routed, qkv_bias=True, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm)
    x, bias = tokens(requires_grad=True), masks()[mask]
    if bias is not None and bias.is_floating_point():
        bias.requires_grad_()
    learned = [x, *mixer.parameters()] + ([bias] if bias is not None and bias.requires_grad else [])
    found = []
    for skip in (True, False):
        mixer.skip = skip
        y = mixer(x, attn_mask=bias)
        found.append([y, *torch.autograd.grad(y.square().sum(), learned, materialize_grads=True)])
    torch.testing.assert_close(found[0], found[1])


def test_only_chosen_pairs_are_computed(monkeypatch):
    """Queries of the routed heads that reach SDPA: the chosen ones, and little padding."""
    seen = []
    whole = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *args, **options):
        seen.append(query.shape[:-1].numel())
        return whole(query, *args, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", counted)
    mixer, x = make(2, 2, skip=True), tokens(8, 64)
    mixer(x)
    chosen = int(mixer.router(x).chosen.sum())
    assert chosen == 8 * 64 * 2
    assert chosen <= sum(seen) - 8 * 64 * 2 < 1.15 * chosen  # less the shared heads' queries


@pytest.mark.parametrize("fill", [True, False])
def test_all_or_none_of_the_queries(fill):
    query, key, value = torch.randn(3, 2, 3, 7, 8).double()
    chosen = torch.full((2, 3, 7), fill)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value) * fill
    torch.testing.assert_close(attend_chosen(query, key, value, chosen), expected)
    chosen[1, 2] = not fill
    expected[1, 2] = 0 if fill else torch.nn.functional.scaled_dot_product_attention(query, key, value)[1, 2]
    torch.testing.assert_close(attend_chosen(query, key, value, chosen), expected)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1)])
def test_skipping_takes_empty_and_small_input(shape):
    mixer = make(1, 1, skip=True)
    x = tokens(*shape)
    assert mixer(x).shape == x.shape and torch.isfinite(mixer(x)).all()


def test_skips_by_itself_where_it_pays():
    mixer = make(2, 2)
    assert [mixer._skips(torch.empty(1, HEADS, count, 8)) for count in (196, 784)] == [False, True]
    assert not mixer._skips(torch.empty(1, HEADS, 784, 8, device="meta"))
    assert not make(2, 4, skip=True)._skips(torch.empty(1, HEADS, 784, 8))  # every head is chosen
    x = tokens(1, 784)
    by_itself = mixer(x)
    mixer.skip = False
    torch.testing.assert_close(by_itself, mixer(x))


def test_asked_to_skip_it_still_compiles_and_transforms():
    mixer, x = make(2, 2, skip=True), tokens()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), mixer(x))
    torch.testing.assert_close(torch.vmap(lambda one: mixer(one[None])[0])(x), mixer(x))


def test_weights_are_gated():
    mixer, x = make(2, 2), tokens()
    weights, gates = mixer.attention_weights(x), mixer.router(x).gates
    torch.testing.assert_close(weights.sum(-1), gates)
    value = mixer.heads(x)[2]
    torch.testing.assert_close(mixer.proj((weights @ value).transpose(1, 2).flatten(2)), mixer(x))


def balance(mixer, x):
    with collect_losses(mixer) as losses:
        mixer(x)
    return losses


def test_balance_is_the_definition():
    mixer, x = make(2, 2), tokens()
    losses = balance(mixer, x)
    (found,) = losses.by_name["balance"]
    scores, chosen = (x @ mixer.router.choose.weight.T).softmax(-1), mixer.router(x).chosen
    expected = sum(scores[..., head].mean() * chosen[:, head].double().mean() for head in range(4)) * 4**2 / 4
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(losses.total(), 0.01 * expected)


def test_balance_of_a_uniform_router_is_the_number_of_chosen_heads():
    mixer = make(2, 3)
    nn.init.zeros_(mixer.router.choose.weight)
    torch.testing.assert_close(balance(mixer, tokens()).by_name["balance"], [torch.tensor(3.0).double()])


def test_balance_trains_the_router_alone_and_lowers_itself():
    mixer, x = make(1, 1), tokens(8)
    values = []
    for _ in range(30):
        losses = balance(mixer, x)
        total = losses.total()
        values.append(total.item())
        grads = torch.autograd.grad(total, list(mixer.parameters()), allow_unused=True)
        used = [name for (name, _), grad in zip(mixer.named_parameters(), grads, strict=True) if grad is not None]
        assert used == ["router.choose.weight"]
        with torch.no_grad():
            mixer.router.choose.weight -= 10 * grads[[n for n, _ in mixer.named_parameters()].index(used[0])]
    assert values[-1] < values[0] - 1e-4


def test_nothing_is_kept_between_steps_and_models():
    first, second, x = make(2, 2), make(2, 2), tokens()
    first(x)
    losses = balance(second, x)
    assert len(losses.by_name["balance"]) == 1
    assert not balance(make(6, 0), x).by_name


def test_collected_once_under_activation_checkpointing():
    mixer = make(2, 2)
    found = []
    for wrapped in (mixer, lambda x: checkpoint(mixer, x, use_reentrant=False)):
        x = tokens()
        with collect_losses(mixer) as losses:
            y = wrapped(x)
            total = y.square().sum() + losses.total()
            (grad,) = torch.autograd.grad(total, mixer.router.choose.weight)
        assert len(losses.by_name["balance"]) == 1
        found.append((len(losses.by_name["balance"]), grad.shape))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("heads", "expected"),
    [(1, (1, 0)), (2, (1, 1)), (3, (1, 1)), (4, (1, 2)), (6, (1, 3)), (8, (2, 4)), (12, (3, 6)), (16, (4, 8))],
)
def test_default_numbers_of_heads(heads, expected):
    value = MoH()
    assert split_heads(heads, value.shared, value.routed) == expected
    mixer = value.attn_layer()(48, heads)
    assert (mixer.router.shared, mixer.router.routed) == expected


def test_numbers_and_fractions():
    assert split_heads(100, 0.29, 0.71) == (29, 71)
    assert split_heads(8, 1.0, 0.5) == (8, 0)
    assert split_heads(8, 0, 8) == split_heads(8, 0.0, 1.0) == (0, 8)
    assert split_heads(8, 1, 1) != split_heads(8, 1.0, 1.0)


@pytest.mark.parametrize(
    ("shared", "routed", "error", "said"),
    [
        (7, 0.5, ValueError, "shared: 7 shared heads, but there are only 6"),
        (3, 4, ValueError, "routed: 4 of the 3 heads that 3 shared ones leave of 6"),
        (3, 0, ValueError, "routed: 0 leaves 3 of 6 heads unused"),
        (0.0, 0.0, ValueError, "routed: 0 leaves 6"),
        (-1, 2, ValueError, "shared: expected 0 heads or more, got -1"),
        (1, 1.5, ValueError, "routed: expected a fraction"),
        (float("nan"), 1, ValueError, "shared: expected a fraction"),
        ("half", 1, TypeError, "shared: expected an int"),
        (1, True, TypeError, "routed: expected an int"),
    ],
)
def test_bad_numbers_of_heads(shared, routed, error, said):
    with pytest.raises(error, match=said):
        MixtureOfHeadsAttention(DIM, HEADS, shared=shared, routed=routed)


def test_bad_values_are_refused_before_any_model():
    with pytest.raises(ValueError, match="shared: expected a fraction"):
        MoH(shared=1.5)
    with pytest.raises(TypeError, match="skip: expected True, False or None, got str"):
        MixtureOfHeadsAttention(DIM, HEADS, skip="always")


def test_value_cannot_attend():
    with pytest.raises(
        ValueError, match="'moh.shared=0.25, routed=0.5.' gates heads by a router with weights of its own"
    ):
        MoH().attend(*torch.randn(3, 1, 2, 4, 8))
