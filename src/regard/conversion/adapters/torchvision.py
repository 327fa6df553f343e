"""torchvision's Swin transformers, which partition, shift and attend in one function."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.conversion.adapters._adapter import Adapter, Attention

__all__ = ["ADAPTERS"]

_HIDDEN = -100.0  # what both papers' code adds to the logits of keys from beyond the seam


def shifted_window(module: Any, attention: Attention, x: Tensor) -> Tensor:
    """(Shifted) window attention on a map (B, H, W, C): Swin, arXiv 2103.14030, and Swin V2, arXiv 2111.09883."""
    batch, height, width, channels = x.shape
    window = tuple(module.window_size)
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    size = (x.shape[1], x.shape[2])
    shift = tuple(0 if w >= s else given for w, s, given in zip(window, size, module.shift_size, strict=True))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
    counts = (size[0] // window[0], size[1] // window[1])
    windows = x.view(batch, counts[0], window[0], counts[1], window[1], channels).transpose(2, 3)
    tokens = windows.reshape(-1, window[0] * window[1], channels)

    logit_scale = getattr(module, "logit_scale", None)  # Swin V2 alone
    bias = module.qkv.bias
    if logit_scale is not None and bias is not None:  # its keys have no bias
        parts = bias.chunk(3)
        bias = torch.cat((parts[0], torch.zeros_like(parts[1]), parts[2]))
    qkv = F.linear(tokens, module.qkv.weight, bias).unflatten(-1, (3, module.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scale = None
    if logit_scale is not None:
        query = F.normalize(query, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp()
        key, scale = F.normalize(key, dim=-1), 1.0
    mask = module.get_relative_position_bias()
    if any(shift):
        seam = _beyond_seam(size, window, shift, x.device)
        hidden = torch.zeros(seam.shape, dtype=x.dtype, device=x.device).masked_fill(seam, _HIDDEN)
        mask = (mask + hidden.unsqueeze(1)).repeat(batch, 1, 1, 1)
    dropout_p = module.attention_dropout if module.training else 0.0
    mixed = attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale, grid_size=window, num_prefix_tokens=0
    )
    tokens = F.linear(mixed.transpose(1, 2).flatten(2), module.proj.weight, module.proj.bias)
    tokens = F.dropout(tokens, p=module.dropout, training=module.training)

    windows = tokens.view(batch, *counts, *window, channels).transpose(2, 3)
    x = windows.reshape(batch, *size, channels)
    if any(shift):
        x = x.roll(shift, dims=(1, 2))
    return x[:, :height, :width].contiguous()


def _beyond_seam(
    size: tuple[int, int], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device
) -> Tensor:
    """(windows, N, N), True where a window of the rolled map joins two tokens that are no neighbours in the image."""
    parts = []
    for length, across, by in zip(size, window, shift, strict=True):
        place = torch.arange(length, device=device)
        # Rolled by `by`, the last window holds its own rest and, behind it, what came around from the other side.
        parts.append((place >= length - across).long() + (place >= length - by).long() if by else place * 0)
    region = parts[0].unsqueeze(1) * 3 + parts[1]
    region = region.view(size[0] // window[0], window[0], size[1] // window[1], window[1]).transpose(1, 2)
    region = region.reshape(-1, window[0] * window[1])
    return region.unsqueeze(1) != region.unsqueeze(2)


_ATTRIBUTES = ("qkv", "proj", "num_heads", "window_size", "shift_size", "attention_dropout", "dropout")
_SWIN = Adapter(("x",), (*_ATTRIBUTES, "get_relative_position_bias"), shifted_window)

ADAPTERS: dict[str, Adapter] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _SWIN,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _SWIN,
}
