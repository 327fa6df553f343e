"""Which keys a query sees: the published rule's golden vectors, a rule written out again, the four borders."""

import itertools
import math

import pytest
import torch
from neighborhood_cases import pattern_of, random_call

from regard import neighborhood_attention
from regard.ops import only_backend
from regard.ops.neighborhood.reference import neighborhood_attention_reference
from regard.ops.neighborhood.windows import BORDERS, Axis, axis_windows, windows_of

GOLDEN = {  # length, kernel, stride, causal, dilation -> the keys of each query, as NATTEN 0.21.7 has them
    (8, 3, 1, False, 1): "0-2 0-2 1-3 2-4 3-5 4-6 5-7 5-7",
    (8, 4, 1, False, 1): "0-3 0-3 0-3 1-4 2-5 3-6 4-7 4-7",
    (10, 4, 2, False, 1): "0-3 0-3 1-4 1-4 3-6 3-6 5-8 5-8 6-9 6-9",
    (10, 5, 3, False, 1): "0-4 0-4 0-4 2-6 2-6 2-6 5-9 5-9 5-9 5-9",
    (9, 3, 3, False, 1): "0-2 0-2 0-2 3-5 3-5 3-5 6-8 6-8 6-8",
    (10, 4, 4, False, 1): "0-3 0-3 0-3 0-3 4-7 4-7 4-7 4-7 6-9 6-9",
    (8, 3, 1, True, 1): "0-0 0-1 0-2 1-3 2-4 3-5 4-6 5-7",
    (10, 4, 2, True, 1): "0-0 0-1 0-2 0-3 2-4 2-5 4-6 4-7 6-8 6-9",
}
DILATED = [(0, 3, 6), (1, 4, 7), (2, 5, 8)] * 2 + [(3, 6, 9), (4, 7, 10), (2, 5, 8), (3, 6, 9), (4, 7, 10)]


def keys_of(axis: Axis, border: str = "shift") -> list[list[int]]:
    found = axis_windows(axis, border)
    return [place[~absent].tolist() for place, absent in zip(found.place, found.absent, strict=True)]


@pytest.mark.parametrize(("options", "ranges"), GOLDEN.items())
def test_golden_vectors(options, ranges) -> None:
    length, kernel, stride, causal, dilation = options
    want = [list(range(int(a), int(b) + 1)) for a, b in (pair.split("-") for pair in ranges.split())]
    assert keys_of(Axis(length, kernel, dilation, stride, causal)) == want


def test_golden_vector_of_a_dilation() -> None:
    assert keys_of(Axis(11, 3, 3, 1, False)) == [list(keys) for keys in DILATED]


def rule(axis: Axis, border: str, x: int) -> list[tuple[int | None, int]]:
    """The windows of the docstring again, one query at a time: (key or None for zeros, offset)."""
    length, kernel, dilation, stride, causal = axis
    group = list(range(x % dilation, length, dilation))
    own, count = group.index(x), len(group)
    leader = own - own % stride + (stride - 1 if causal else stride // 2)
    if border == "shift":
        leader = min(leader, count - 1)
    start = leader - (kernel - 1 if causal else kernel // 2)
    if border == "shift":
        start = max(0, min(start, count - kernel))
    found = []
    for place in range(start, start + kernel):
        if causal and place > own:
            continue
        offset = place - own + kernel - 1
        if 0 <= place < count:
            found.append((group[place], offset))
        elif border == "zeropad":
            found.append((None, offset))
        elif border == "replicate":
            found.append((group[0 if place < 0 else -1], offset))
    return found


@pytest.mark.parametrize("border", BORDERS)
def test_every_small_axis(border: str) -> None:
    for length, kernel, dilation, causal in itertools.product(range(1, 9), range(1, 7), (1, 2, 3), (False, True)):
        for stride in range(1, kernel + 1):
            axis = Axis(length, kernel, dilation, stride, causal)
            found = axis_windows(axis, border)
            for x in range(length):
                want = rule(axis, border, x)
                counts = ~found.absent[x]
                places = [
                    None if z else p
                    for p, z in zip(found.place[x][counts].tolist(), found.zero[x][counts], strict=True)
                ]
                assert list(zip(places, found.offset[x][counts].tolist(), strict=True)) == want, axis
                assert x in places, "a query sees itself"
                assert all(0 <= offset <= 2 * kernel - 2 for _, offset in want)


@pytest.mark.parametrize("border", BORDERS)
def test_the_reference_is_the_rule(border: str) -> None:
    """One query at a time, in plain loops, with bias, prefix, hidden keys and grouped heads."""
    pattern = pattern_of((4, 5), (3, 2), (1, 2), (2, 1), (False, True), border)
    call = random_call(pattern, prefix=2, bias=True, hidden=True, dtype=torch.float64)
    output = neighborhood_attention_reference(call)
    table = call.attn_bias.double().unflatten(1, (5, 3))
    axes = list(pattern.axes())
    for b, h, n in itertools.product(range(2), range(2), range(22)):
        key, value = call.key[b, h], call.value[b, h]
        seen = [m for m in range(2 if n >= 2 else 22) if call.visible[b, m]]
        terms = [(float(call.query[b, h, n] @ key[m]) * call.scale, value[m]) for m in seen]
        if n >= 2:
            y, x = divmod(n - 2, 5)
            for (ky, oy), (kx, ox) in itertools.product(rule(axes[0], border, y), rule(axes[1], border, x)):
                outside = ky is None or kx is None
                m = None if outside else 2 + ky * 5 + kx
                if m is not None and not call.visible[b, m]:
                    continue
                logit = 0.0 if m is None else float(call.query[b, h, n] @ key[m]) * call.scale
                terms.append((logit + float(table[h, oy, ox]), torch.zeros_like(value[0]) if m is None else value[m]))
        want = torch.zeros_like(value[0])
        if terms:
            soft = torch.tensor([t for t, _ in terms], dtype=torch.float64).softmax(dim=0)
            want = sum(w * v for w, (_, v) in zip(soft, terms, strict=True))
        torch.testing.assert_close(output[b, h, n], want)


@pytest.mark.parametrize("grid", [(9,), (5, 7), (3, 4, 5)])
def test_shifted_windows_have_all_their_keys(grid: tuple[int, ...]) -> None:
    """prod(kernel_size) keys each, all of them different; at most all there are."""
    for kernel, dilation in ((3, 1), (2, 2), (20, 1)):
        pattern = pattern_of(grid, kernel, dilation)
        windows = windows_of(pattern, torch.arange(math.prod(grid)))
        whole = math.prod(min(kernel, -(-n // dilation)) for n in grid)
        for keys, absent in zip(windows.key, windows.absent, strict=True):
            seen = keys[~absent]
            assert len(seen) == len(set(seen.tolist()))
            assert len(seen) == whole or (dilation > 1 and len(seen) < whole)
            assert dilation > 1 or len(seen) == whole


def test_it_agrees_with_natten() -> None:
    """Its forward runs on the processor through FlexAttention, with head dims that are powers of two."""
    natten = pytest.importorskip("natten")
    g = torch.Generator().manual_seed(0)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    for _ in range(12):
        rank = some(1, 3)
        kernel = [some(2, (9, 5, 3)[rank - 1]) for _ in range(rank)]
        dilation = [some(1, 2) for _ in range(rank)]
        grid = [w * d + some(0, 5) for w, d in zip(kernel, dilation, strict=True)]
        stride = [some(1, w) for w in kernel]
        causal = [some(0, 3) == 0 for _ in range(rank)]
        pattern = pattern_of(grid, kernel, dilation, stride, causal)
        call = random_call(pattern)
        options = {"kernel_size": kernel, "dilation": dilation, "stride": stride, "is_causal": causal}
        options = {name: tuple(option) for name, option in options.items()}

        def laid(t, grid=grid):
            return t.transpose(1, 2).unflatten(1, grid)

        theirs = getattr(natten, f"na{rank}d")(
            laid(call.query), laid(call.key), laid(call.value), **options, backend="flex-fna"
        )
        with only_backend("pytorch"):
            ours = neighborhood_attention(call.query, call.key, call.value, grid_size=grid, **options)
        torch.testing.assert_close(laid(ours), theirs, rtol=1e-4, atol=1e-5)
