"""What neighborhood attention must equal, and when: dense, causal, blocked, interleaved and convolved attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS
from neighborhood_cases import dense_weights, pattern_of, random_call

from regard import neighborhood_attention
from regard.ops import only_backend
from regard.ops.neighborhood.windows import BORDERS

KINDS = [(b, torch.float32) for b in BACKENDS] + [("pytorch", torch.float64)]
everywhere = pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=[f"{b}-{d}" for b, d in KINDS])


def tensors(tokens: int, dtype: torch.dtype, heads: int = 2, dim: int = 16) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return list(torch.randn(3, 2, heads, tokens, dim, generator=g).to(dtype))


def run(backend: str, qkv, grid, kernel, **options) -> torch.Tensor:
    with only_backend(backend):
        return neighborhood_attention(*qkv, grid_size=grid, kernel_size=kernel, **options)


@everywhere
@pytest.mark.parametrize("grid", [(12,), (5, 7), (3, 4, 5), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_window_of_the_grid_is_dense_attention(grid, stride: int, backend: str, dtype: torch.dtype) -> None:
    """And so is a larger one."""
    qkv = tensors(math.prod(grid), dtype)
    want = F.scaled_dot_product_attention(*qkv)
    steps = tuple(min(stride, n) for n in grid)
    torch.testing.assert_close(run(backend, qkv, grid, grid, stride=steps), want)
    torch.testing.assert_close(run(backend, qkv, grid, 20, stride=stride), want)


@everywhere
def test_a_causal_window_of_the_sequence_is_causal_attention(backend: str, dtype: torch.dtype) -> None:
    qkv = tensors(23, dtype)
    want = F.scaled_dot_product_attention(*qkv, is_causal=True)
    for kernel in (23, 40):
        torch.testing.assert_close(run(backend, qkv, (23,), kernel, is_causal=True), want)


@everywhere
@pytest.mark.parametrize("border", BORDERS)
def test_a_stride_of_the_window_is_blocked_attention(border: str, backend: str, dtype: torch.dtype) -> None:
    """Where the window divides the grid no border is met."""
    height, width, size = 8, 12, 4
    qkv = tensors(height * width, dtype)

    def blocks(t):
        t = t.unflatten(2, (height // size, size, width // size, size)).transpose(3, 4)
        return t.flatten(4, 5).permute(0, 2, 3, 1, 4, 5)

    want = F.scaled_dot_product_attention(*(blocks(t) for t in qkv))
    want = want.permute(0, 3, 1, 2, 4, 5).unflatten(4, (size, size)).transpose(3, 4).flatten(2, 5)
    torch.testing.assert_close(run(backend, qkv, (height, width), size, stride=size, border=border), want)


@everywhere
@pytest.mark.parametrize("border", ["mask", "zeropad"])
def test_a_halo_around_each_block(border: str, backend: str, dtype: torch.dtype) -> None:
    """HaloNet (arXiv 2103.12731): kernel = block + 2 halo, stride = block; zeros beyond the image, masked or not."""
    height, width, size, halo = 8, 12, 4, 2
    query, key, value = tensors(height * width, dtype)

    def unfolded(t):
        t = t.transpose(-1, -2).flatten(0, 1).unflatten(-1, (height, width))
        boxes = F.unfold(t, size + 2 * halo, padding=halo, stride=size)  # (B H, D K, blocks)
        return boxes.unflatten(1, (t.shape[1], -1)).permute(0, 3, 2, 1).unflatten(0, (2, 2))

    inside = unfolded(torch.ones_like(key))[..., 0] > 0
    q = query.unflatten(2, (height // size, size, width // size, size)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    mask = inside.unsqueeze(-2) if border == "mask" else None
    want = F.scaled_dot_product_attention(q, unfolded(key), unfolded(value), attn_mask=mask)
    want = want.unflatten(3, (size, size)).unflatten(2, (height // size, width // size)).transpose(3, 4).flatten(2, 5)
    ours = run(backend, (query, key, value), (height, width), size + 2 * halo, stride=size, border=border)
    torch.testing.assert_close(ours, want)


@everywhere
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dilation", [(2, 3), (4, 1)])
def test_a_dilation_is_attention_in_each_interleaved_grid(border, dilation, backend: str, dtype: torch.dtype) -> None:
    height, width = 9, 14
    qkv = [t.unflatten(2, (height, width)) for t in tensors(height * width, dtype)]
    want = torch.empty_like(qkv[0])
    for y in range(dilation[0]):
        for x in range(dilation[1]):
            part = [t[:, :, y :: dilation[0], x :: dilation[1]] for t in qkv]
            grid = part[0].shape[2:4]
            mixed = run(backend, [t.flatten(2, 3) for t in part], grid, 3, border=border)
            want[:, :, y :: dilation[0], x :: dilation[1]] = mixed.unflatten(2, grid)
    flat = [t.flatten(2, 3) for t in qkv]
    ours = run(backend, flat, (height, width), 3, dilation=dilation, border=border)
    torch.testing.assert_close(ours, want.flatten(2, 3))


@everywhere
@pytest.mark.parametrize(("border", "padding"), [("zeropad", "constant"), ("replicate", "replicate")])
def test_equal_logits_make_a_box_filter(border: str, padding: str, backend: str, dtype: torch.dtype) -> None:
    """With queries of zero the output is the mean of the padded image under the window."""
    query, key, value = tensors(9 * 14, dtype)
    image = F.pad(value.transpose(-1, -2).flatten(0, 1).unflatten(-1, (9, 14)), (2, 2, 1, 1), mode=padding)
    want = F.avg_pool2d(image, (3, 5), stride=1).flatten(2).mT.unflatten(0, (2, 2))
    ours = run(backend, (torch.zeros_like(query), key, value), (9, 14), (3, 5), border=border)
    torch.testing.assert_close(ours, want)


@everywhere
def test_a_bias_alone_is_a_convolution(backend: str, dtype: torch.dtype) -> None:
    """One for each head, of the bias's softmax, where all keys are alike; the window's own offsets are its middle."""
    query, key, value = tensors(9 * 14, dtype)
    bias = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    kernel = bias[:, 1:4, 2:7].flatten(1).softmax(dim=-1).unflatten(-1, (3, 5))
    image = value.permute(0, 3, 1, 2).flatten(0, 1).unflatten(-1, (9, 14))
    want = F.conv2d(image, kernel.unsqueeze(1), padding=(1, 2), groups=2)
    want = want.flatten(2).unflatten(0, (2, 16)).permute(0, 2, 3, 1)
    ours = run(backend, (torch.zeros_like(query), key, value), (9, 14), (3, 5), border="zeropad", attn_bias=bias)
    torch.testing.assert_close(ours, want)


@everywhere
def test_a_bias_in_a_window_of_the_grid_is_a_bias_of_dense_attention(backend: str, dtype: torch.dtype) -> None:
    grid = (4, 5)
    qkv = tensors(20, dtype)
    bias = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij"))
    offsets = (y[None] - y[:, None] + 3), (x[None] - x[:, None] + 4)
    want = F.scaled_dot_product_attention(*qkv, attn_mask=bias[:, offsets[0], offsets[1]])
    torch.testing.assert_close(run(backend, qkv, grid, grid, attn_bias=bias), want)
    torch.testing.assert_close(run(backend, qkv, grid, grid, attn_bias=bias.flatten(1)), want)


@everywhere
def test_prefix_tokens_see_all_and_are_seen_by_all(backend: str, dtype: torch.dtype) -> None:
    """Dense attention under the mask that says so."""
    qkv = tensors(3 + 42, dtype)
    weights = dense_weights(random_call(pattern_of((6, 7), 3), prefix=3))
    mask = weights[0, 0] > 0
    assert mask[:3].all() and mask[:, :3].all() and mask[3:, 3:].sum() == 42 * 9
    want = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    torch.testing.assert_close(run(backend, qkv, (6, 7), 3, num_prefix_tokens=3), want)


@everywhere
def test_grouped_heads_are_repeated_heads(backend: str, dtype: torch.dtype) -> None:
    query = tensors(42, dtype, heads=6)[0]
    key, value = tensors(42, dtype, heads=2)[1:]
    ours = run(backend, (query, key, value), (6, 7), 3, enable_gqa=True)
    wide = run(backend, (query, *(t.repeat_interleave(3, dim=1) for t in (key, value))), (6, 7), 3)
    torch.testing.assert_close(ours, wide)


@everywhere
def test_hidden_keys_are_as_if_they_were_not_there(backend: str, dtype: torch.dtype) -> None:
    qkv = tensors(42, dtype)
    shown = torch.rand(42, generator=torch.Generator().manual_seed(2)) > 0.3
    box = dense_weights(random_call(pattern_of((6, 7), 3)))[0, 0] > 0
    want = F.scaled_dot_product_attention(*qkv, attn_mask=box & shown)
    torch.testing.assert_close(run(backend, qkv, (6, 7), 3, attn_mask=shown), want)


@everywhere
def test_the_grid_may_be_transposed(backend: str, dtype: torch.dtype) -> None:
    """Along whichever axis the lines lie in memory."""
    qkv = tensors(6 * 20, dtype)
    other = [t.unflatten(2, (6, 20)).transpose(2, 3).flatten(2, 3) for t in qkv]
    options = {"border": "replicate", "dilation": (1, 2), "stride": (2, 1)}
    ours = run(backend, qkv, (6, 20), (4, 5), **options)
    turned = run(backend, other, (20, 6), (5, 4), border="replicate", dilation=(2, 1), stride=(1, 2))
    torch.testing.assert_close(ours, turned.unflatten(2, (20, 6)).transpose(2, 3).flatten(2, 3))


def test_a_causal_output_does_not_know_what_follows() -> None:
    """Under "shift" a leader is held to the axis, as NATTEN has it; the other borders do not know its length."""
    query, key, value = tensors(23, torch.float64)
    for border in ("mask", "zeropad", "replicate"):
        whole = run("pytorch", (query, key, value), (23,), 7, stride=3, is_causal=True, border=border)
        part = [t[:, :, :17] for t in (query, key, value)]
        torch.testing.assert_close(
            whole[:, :, :17], run("pytorch", part, (17,), 7, stride=3, is_causal=True, border=border)
        )
