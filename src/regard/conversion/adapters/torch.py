"""nn.MultiheadAttention, which hides its scaled_dot_product_attention and goes past it in evaluation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.conversion.adapters._adapter import Adapter, Attention, Override

__all__ = ["ADAPTERS"]


def multihead(
    module: Any,
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """Multi-head attention (arXiv 1706.03762) of nn.MultiheadAttention.

    No weights are handed back, whatever `need_weights` says: a mechanism that looks at few keys never forms them all.
    `is_causal` is only a hint there that `attn_mask` is causal; the mask itself is obeyed.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("attn_mask: nn.MultiheadAttention takes is_causal as a hint only; pass the causal attn_mask")
    batched = query.dim() == 3
    if not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    query, key, value = _projected(module, query, key, value)
    batch, tokens, keys = len(query), query.shape[1], key.shape[1]
    mask = _joined_mask(attn_mask, key_padding_mask, (batch, module.num_heads, tokens, keys), query.dtype)
    extra = [(module.bias_k, module.bias_v)] if module.bias_k is not None else []
    if module.add_zero_attn:
        zero = key.new_zeros(1, 1, key.shape[-1])
        extra.append((zero, zero))
    for more_key, more_value in extra:  # keys that every query may see
        key, value = (torch.cat((x, y.expand(batch, 1, -1)), 1) for x, y in ((key, more_key), (value, more_value)))
        if mask is not None:
            mask = F.pad(mask, (0, 1), value=mask.dtype == torch.bool)
    query, key, value = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    mixed = attention(query, key, value, attn_mask=mask, dropout_p=module.dropout if module.training else 0.0)
    mixed = module.out_proj(mixed.transpose(1, 2).flatten(2))
    if not batched:
        return mixed.squeeze(0), None
    return mixed if module.batch_first else mixed.transpose(0, 1), None


def _projected(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    elif query is key and key is value:
        return F.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
    else:
        weights = module.in_proj_weight.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))


def _joined_mask(
    attn_mask: Tensor | None, padding: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """One mask as scaled_dot_product_attention takes it: there True means attend, in nn.MultiheadAttention hide.

    Args:
        attn_mask: (N, M) or (B * H, N, M). padding: (B, M). Both boolean or added to the logits.
        shape: (B, H, N, M).
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.reshape(shape))
    if padding is not None:
        masks.append(padding[:, None, None])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~masks[0] & ~masks[1] if len(masks) == 2 else ~masks[0]
    hidden = float("-inf")
    added = [m if m.dtype != torch.bool else torch.zeros_like(m, dtype=dtype).masked_fill(m, hidden) for m in masks]
    return added[0] + added[1] if len(added) == 2 else added[0]


def _no_fast_path(module: nn.Module, around: Sequence[nn.Module]) -> list[Override]:
    """In evaluation nn.TransformerEncoderLayer computes the whole layer at once, and nn.TransformerEncoder feeds it
    nested tensors; both ask these attributes first, and only for that."""
    found = []
    for outer in around:
        if isinstance(outer, nn.TransformerEncoderLayer) and module is outer.self_attn:
            found.append(Override(outer, "activation_relu_or_gelu", 0))
        elif isinstance(outer, nn.TransformerEncoder):
            found.append(Override(outer, "use_nested_tensor", False))
    return found


ADAPTERS: dict[str, Adapter] = {
    "torch.nn.modules.activation.MultiheadAttention": Adapter(
        ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"),
        ("num_heads", "batch_first", "dropout", "in_proj_weight", "in_proj_bias", "out_proj", "bias_k", "bias_v")
        + ("add_zero_attn", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        multihead,
        overrides=_no_fast_path,
    ),
}
