"""Sparsifiner's attention: against a dense masked formulation, its identities, its losses, its grids."""

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regard.auxiliary import collect_losses
from regard.mixers import DenseAttention, Sparsifiner, SparsifinerAttention, parse_mechanism
from regard.mixers._resampling import resampled
from regard.mixers.sparsifiner import set_budget, taught_by

DIM, HEADS, PREFIX, GRID = 32, 2, 2, (4, 5)
TOKENS = PREFIX + math.prod(GRID)


def make(prefix=PREFIX, **options):
    torch.manual_seed(0)
    options = {"budget": 0.3, "basis_grid": GRID, "token_reduction": 3, "coefficients": 3, **options}
    mixer = SparsifinerAttention(DIM, HEADS, qkv_bias=True, num_prefix_tokens=prefix, **options).double()
    with torch.no_grad():  # logits and a basis whose entries are about 1: choices then depend on all of it
        mixer.qkv.weight.mul_(4.0)
        for table in (mixer.predictor.down, mixer.predictor.up):
            table.mul_(30.0)
    return mixer.eval()


def drawn(tokens=TOKENS, batch=2, seed=1):
    return torch.randn(batch, tokens, DIM, generator=torch.Generator().manual_seed(seed)).double()


def chosen(mixer, query, key, official=False):
    """(B, H, N, N) boolean: the choice, from the paper's equations, dense, for the basis's own grid."""
    p, options = mixer.predictor, mixer.predictor.options
    low = query[:, :, PREFIX:] @ p.query.weight.T + p.query.bias
    keys = torch.einsum("bhmc,mr->bhrc", key @ p.key.weight.T + p.key.bias, p.down)
    cheap = torch.einsum("bhnc,bhrc->bhnr", low, keys) / math.sqrt(mixer.num_heads if official else low.shape[-1])
    coefficients = cheap.exp() / cheap.exp().sum(-1, keepdim=True)
    floor = coefficients.sort(-1, descending=True).values[..., options.coefficients - 1, None]
    basis = torch.where(p.up.abs() > options.basis_threshold, p.up.abs() if official else p.up, 0.0)
    predicted = torch.where(coefficients >= floor, coefficients, 0.0) @ basis.T
    order = predicted.sort(dim=-1, descending=True, stable=True).indices[..., : math.ceil(mixer.budget * TOKENS)]
    mask = torch.zeros_like(predicted, dtype=torch.bool).scatter(-1, order, True)
    return torch.cat([torch.ones_like(mask[:, :, :1]).expand(-1, -1, PREFIX, -1), mask], dim=2)


def oracle(mixer, x, official=False):
    """The published way: all logits, then a mask."""
    query, key, value = mixer.heads(x)
    logits = query @ key.mT * mixer.scale
    logits = logits.masked_fill(~chosen(mixer, query, key, official), -math.inf)
    return mixer.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


def mean(losses):
    """The layers' mean of the loss."""
    return torch.stack(losses.by_name["sparsifiner"]).mean()


def reconstruction(mixer, x, **options):
    with collect_losses(mixer) as losses:
        mixer(x, **options)
    return losses


@pytest.mark.parametrize("official", [False, True])
def test_equals_the_dense_masked_formulation_with_gradients(official):
    mixer, x = make(official=official), drawn().requires_grad_()
    shared = [x, *(p for n, p in mixer.named_parameters() if not n.startswith("predictor"))]
    ours, theirs = mixer(x, grid_size=GRID), oracle(mixer, x, official)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad((y * weight).sum(), shared) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)


def test_official_scores_choose_otherwise():
    """The two readings of the paper differ, or the test above shows little."""
    query, key, _ = make().heads(drawn())
    assert (chosen(make(), query, key) != chosen(make(), query, key, official=True)).any()


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_exactly_the_budget_is_kept(prefix):
    mixer, x = make(prefix), drawn(prefix + 20)
    weights = mixer.attention_weights(x, grid_size=GRID)
    kept = (weights > 0).sum(-1)
    assert (kept[:, :, :prefix] == x.shape[1]).all()
    assert (kept[:, :, prefix:] == math.ceil(0.3 * x.shape[1])).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_prefix_queries_attend_densely():
    mixer, dense, x = make(), DenseAttention(DIM, HEADS, qkv_bias=True).double(), drawn()
    dense.load_state_dict({n: p for n, p in mixer.state_dict().items() if not n.startswith("predictor")})
    torch.testing.assert_close(mixer(x, grid_size=GRID)[:, :PREFIX], dense(x)[:, :PREFIX])
    assert not torch.allclose(mixer(x, grid_size=GRID)[:, PREFIX:], dense(x)[:, PREFIX:])
    for budget in (1.0, TOKENS, 1000):
        set_budget(mixer, budget)
        torch.testing.assert_close(mixer(x, grid_size=GRID), dense(x))


def test_a_predictor_of_zeros_keeps_the_first_keys():
    mixer, x = make(), drawn()
    for parameter in mixer.predictor.parameters():
        nn.init.zeros_(parameter)
    kept = mixer.attention_weights(x, grid_size=GRID)[:, :, PREFIX:] > 0
    assert kept[..., :7].all() and not kept[..., 7:].any()
    assert torch.isfinite(mixer(x, grid_size=GRID)).all()


def test_coefficients_above_a_threshold():
    above = make(coefficients=0.2)
    largest = make(coefficients=0.2).predictor.coefficients(*above.heads(drawn())[:2], None, GRID)
    counts = (largest > 0.2).sum(-1).unique().tolist()
    assert len(counts) > 1  # differs from row to row, so no number of largest ones is the same
    assert not torch.equal(above(drawn(), grid_size=GRID), make()(drawn(), grid_size=GRID))
    torch.testing.assert_close(
        make(coefficients=0.0)(drawn(), grid_size=GRID), make(coefficients=100)(drawn(), grid_size=GRID)
    )


def test_only_the_reconstruction_trains_the_predictor():
    mixer, x = make(), drawn()
    with collect_losses(mixer) as losses:
        mixer(x, grid_size=GRID).square().sum().backward(retain_graph=True)
    assert all(p.grad is None for p in mixer.predictor.parameters())
    assert mixer.qkv.weight.grad.abs().sum() > 0
    losses.total().backward()
    assert all(p.grad.abs().sum() > 0 for p in mixer.predictor.parameters())


def test_reconstruction_is_the_squared_error_of_the_maps():
    """In low-rank form, nothing N x N held: its value and its gradients are those of the maps' own."""
    mixer, x = make(), drawn()
    p = mixer.predictor
    query, key, _ = mixer.heads(x)
    with torch.no_grad():
        target = (query @ key.mT * mixer.scale).softmax(-1)[:, :, PREFIX:]
    low, keys = p.query(query[:, :, PREFIX:]), p.key(key)
    cheap = low @ (keys.mT @ p.down) / math.sqrt(low.shape[-1])
    expected = (cheap.softmax(-1) @ p.up.T - target).square().sum() / len(x)
    losses = reconstruction(mixer, x, grid_size=GRID)
    torch.testing.assert_close(mean(losses), expected)
    torch.testing.assert_close(losses.total(), 0.01 * expected)
    parameters = [*p.parameters(), mixer.qkv.weight]
    found, wanted = (torch.autograd.grad(loss, parameters) for loss in (mean(losses), expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_reconstruction_of_hidden_keys():
    mixer, x, allowed = make(), drawn(), torch.arange(TOKENS) < 15
    other = torch.where(allowed[:, None], x, torch.randn_like(x))
    found = [
        reconstruction(mixer, tokens, attn_mask=allowed.expand(TOKENS, TOKENS), grid_size=GRID).total()
        for tokens in (x, other)
    ]
    # The hidden tokens' own queries count, so that the two differ; what they hold as keys does not.
    query, key, _ = mixer.heads(x)
    moved = mixer.heads(other)[1]
    visible = allowed.expand(2, -1)
    one, two = (mixer.predictor.reconstruction_loss(query, k, (query, k), visible, GRID) for k in (key, moved))
    torch.testing.assert_close(one, two)
    assert torch.isfinite(torch.stack(found)).all()


def test_nothing_is_computed_for_a_loss_that_nobody_collects():
    mixer, x = make(), drawn()
    counts = []
    for collects in (False, True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            reconstruction(mixer, x, grid_size=GRID) if collects else mixer(x, grid_size=GRID)
        counts.append(counter.get_total_flops())
    assert counts[0] < counts[1]


def student_and_teacher():
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    teacher = timm.models.VisionTransformer(**size).eval()
    layer = Sparsifiner(basis_grid=(4, 4), token_reduction=3).attn_layer(num_prefix_tokens=1)
    student = timm.models.VisionTransformer(**size, attn_layer=layer).eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student, teacher, torch.randn(3, 3, 32, 32)


def test_a_teachers_maps():
    torch.manual_seed(0)
    student, teacher, images = student_and_teacher()

    def loss(by):
        with taught_by(student, by):
            with torch.no_grad():
                by(images)
            with collect_losses(student) as losses:
                student(images)
        return mean(losses)

    set_budget(student, 1.0)  # then the student's maps are the teacher's
    with collect_losses(student) as losses:
        student(images)
    torch.testing.assert_close(loss(teacher), mean(losses))
    assert all(block.attn.taught is None for block in student.blocks)
    other = copy.deepcopy(teacher)
    nn.init.normal_(other.blocks[1].attn.qkv.weight)
    assert not torch.allclose(loss(other), mean(losses))


def test_predictors_learn():
    torch.manual_seed(0)
    student, teacher, images = student_and_teacher()
    set_budget(student, 1.0)
    predictors = [block.attn.predictor for block in student.blocks]
    optimizer = torch.optim.Adam([p for module in predictors for p in module.parameters()], lr=0.02)
    found = []
    for _ in range(40):
        with taught_by(student, teacher):
            with torch.no_grad():
                teacher(images)
            with collect_losses(student) as losses:
                student(images)
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
        found.append(mean(losses).item())
    assert found[-1] < 0.2 * found[0]


def test_teachers_that_do_not_fit():
    student, _, _ = student_and_teacher()
    teacher = timm.models.VisionTransformer(img_size=32, embed_dim=32, depth=2, num_heads=4)
    said = r"teacher: attention layers of \[4, 4\] heads, the student's have \[2, 2\]"
    with pytest.raises(ValueError, match=said), taught_by(student, teacher):
        pass
    with pytest.raises(ValueError, match="has no SparsifinerAttention"):
        set_budget(teacher, 0.5)
    with pytest.raises(ValueError, match=r"budget: as a fraction it must lie in \(0, 1\]"):
        set_budget(student, 1.5)


def test_images_do_not_see_each_other():
    mixer, x = make(), drawn(batch=3)
    torch.testing.assert_close(mixer(x, grid_size=GRID)[1:2], mixer(x[1:2], grid_size=GRID))
    whole = reconstruction(mixer, x, grid_size=GRID).total()
    each = [reconstruction(mixer, x[i : i + 1], grid_size=GRID).total() for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(each).mean())


def test_hidden_keys_are_not_kept():
    mixer, x, allowed = make(), drawn(), torch.arange(TOKENS) % 3 > 0
    weights = mixer.attention_weights(x, attn_mask=allowed.expand(TOKENS, TOKENS), grid_size=GRID)
    assert (weights[..., ~allowed] == 0).all()
    assert ((weights > 0).sum(-1)[:, :, PREFIX:] == 7).all()  # the budget of all keys, of those that are left
    few = torch.arange(TOKENS) < 4
    weights = mixer.attention_weights(x, attn_mask=few.expand(TOKENS, TOKENS), grid_size=GRID)
    assert torch.equal(weights > 0, few.expand_as(weights))


def test_causal_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="is_causal: the predictor sums over all tokens"):
        make()(drawn(), is_causal=True, grid_size=GRID)


def test_resampling_is_the_identity_on_its_own_grid():
    table = torch.randn(20, 3)
    for grid in (GRID, (20,)):
        assert torch.equal(resampled(table, GRID, grid), table)
    assert torch.equal(resampled(table, GRID, (3, *GRID)), table.repeat(3, 1))


@pytest.mark.parametrize("grid", [(8, 10), (5, 7), (2, 3), (13, 2), (1, 1)])
def test_resampling_is_bilinear_interpolation(grid):
    table = torch.randn(20, 3, dtype=torch.float64)
    image = table.unflatten(0, GRID).permute(2, 0, 1)[None]
    expected = nn.functional.interpolate(image, size=grid, mode="bilinear", antialias=True)
    torch.testing.assert_close(resampled(table, GRID, grid), expected[0].flatten(1).T)


def test_a_finer_picture_of_the_same_thing_has_the_same_coefficients():
    """Each cell four times, and tables that do not depend on the place: sums over cells keep their size."""
    mixer = make(prefix=0)
    with torch.no_grad():
        mixer.predictor.down.copy_(mixer.predictor.down[:1].expand(20, -1))
    coarse = drawn(20).unflatten(1, GRID)
    fine = coarse.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    found = []
    for x in (coarse, fine):
        query, key, _ = mixer.heads(x.flatten(1, 2))
        found.append(mixer.predictor.coefficients(query, key, None, tuple(x.shape[1:3])))
    finer = found[0].unflatten(2, GRID).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).flatten(2, 3)
    torch.testing.assert_close(found[1], finer)


def test_attending_without_training_is_refused():
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="sparsifiner: a trained predictor says which keys are kept"):
        Sparsifiner().attend(query, query, query)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sparsifiner(budget=0)", "budget: a row keeps at least one key, got 0"),
        ("sparsifiner(budget=1.5)", "budget: as a fraction"),
        ("sparsifiner(token_reduction=0)", "token_reduction: expected at least 1"),
        ("sparsifiner(dim_reduction=0)", "dim_reduction: expected at least 1"),
        ("sparsifiner(coefficients=1.0)", r"coefficients: as a threshold it must lie in \[0, 1\)"),
        ("sparsifiner(basis_threshold=-1)", "basis_threshold: expected 0 or more"),
        ("sparsifiner(basis_grid=(0, 3))", "basis_grid: expected at least 1"),
    ],
)
def test_bad_options(text, said):
    with pytest.raises(ValueError, match=said):
        parse_mechanism(text)
    with pytest.raises(TypeError, match=r"basis_grid: expected \(height, width\), got 14"):
        Sparsifiner(basis_grid=14)


def test_text_form_is_read_back():
    mechanism = Sparsifiner(budget=50, basis_grid=[7, 9], official=True)
    assert parse_mechanism(str(mechanism)) == mechanism and mechanism.basis_grid == (7, 9)
    layer = mechanism.attn_layer()(DIM)
    assert layer.predictor.down.shape == (63, 10) and str(mechanism) in repr(layer)
