"""timm's attention classes: those that take the softmax by hand, those that know their grid, those that are left.

Written from the equations of the papers named; every module computes with its own parameters.
"""

import importlib
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.conversion.adapters._adapter import Adapter, Attention
from regard.ops._dispatch import constant_when_traced

__all__ = ["ADAPTERS", "LEFT"]


def _dropout(module: Any) -> float:
    """Dropout of the attention weights that is in force now."""
    return float(module.attn_drop.p) if module.training else 0.0


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * H * D) -> `parts` tensors (B, H, N, D)."""
    batch, tokens, _ = x.shape
    return x.reshape(batch, tokens, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _joined(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def _with_window_mask(bias: Tensor, mask: Tensor | None, windows: int) -> Tensor:
    """The bias (H, N, N) of every window and the mask (W, N, N) of an image's W windows, as one additive mask."""
    if mask is None:
        return bias
    return (bias + mask.unsqueeze(1)).repeat(windows // mask.shape[0], 1, 1, 1)


def _cosine_query(query: Tensor, logit_scale: Tensor) -> Tensor:
    """Unit queries that carry their head's learned temperature, at most 100 (Swin V2, arXiv 2111.09883)."""
    temperature = logit_scale.reshape(-1, 1, 1).clamp(max=math.log(100.0)).exp()
    return F.normalize(query, dim=-1) * temperature


def swin_v2(module: Any, attention: Attention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cosine attention with a continuous relative position bias (Swin V2, arXiv 2111.09883)."""
    if module.q_bias is None:
        qkv = module.qkv(x)
    else:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        qkv = module.qkv(x) + bias if module.qkv_bias_separate else F.linear(x, module.qkv.weight, bias)
    query, key, value = _heads(qkv, 3, module.num_heads)
    area = module.window_size[0] * module.window_size[1]
    table = module.cpb_mlp(module.relative_coords_table).view(-1, module.num_heads)
    position = table[module.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
    mixed = attention(
        _cosine_query(query, module.logit_scale),
        F.normalize(key, dim=-1),
        value,
        attn_mask=_with_window_mask(16 * torch.sigmoid(position), mask, len(x)),
        dropout_p=_dropout(module),
        scale=1.0,
        grid_size=tuple(module.window_size),
        num_prefix_tokens=0,
    )
    return module.proj_drop(module.proj(_joined(mixed)))


def swin_v2_cr(module: Any, attention: Attention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cosine attention with a log-spaced relative position bias (Swin V2, arXiv 2111.09883, timm's own variant)."""
    query, key, value = _heads(module.qkv(x), 3, module.num_heads)
    area = module.window_size[0] * module.window_size[1]
    position = module.meta_mlp(module.relative_coordinates_log).transpose(1, 0).reshape(-1, area, area)
    mixed = attention(
        _cosine_query(query, module.logit_scale),
        F.normalize(key, dim=-1),
        value,
        attn_mask=_with_window_mask(position, mask, len(x)),
        dropout_p=_dropout(module),
        scale=1.0,
        grid_size=tuple(module.window_size),
        num_prefix_tokens=0,
    )
    return module.proj_drop(module.proj(_joined(mixed)))


def tnt(module: Any, attention: Attention, x: Tensor) -> Tensor:
    """Attention among the pixels of a patch, or patches (TNT, arXiv 2103.00112); values may be wider than queries."""
    query, key = _heads(module.qk(x), 2, module.num_heads)
    (value,) = _heads(module.v(x), 1, module.num_heads)
    mixed = attention(query, key, value, dropout_p=_dropout(module), scale=module.scale)
    return module.proj_drop(module.proj(_joined(mixed)))


def levit(module: Any, attention: Attention, x: Tensor) -> Tensor:
    """Attention with a bias for each offset (LeViT, arXiv 2104.01136), on tokens or, with convolutions, on a map."""
    widths = [module.key_dim, module.key_dim, module.val_dim]
    if module.use_conv:
        flat = module.qkv(x).reshape(len(x), module.num_heads, sum(widths), -1)
        query, key, value = (part.transpose(-2, -1) for part in flat.split(widths, dim=2))
    else:
        flat = module.qkv(x).view(len(x), -1, module.num_heads, sum(widths)).transpose(1, 2)
        query, key, value = flat.split(widths, dim=-1)
    mixed = attention(
        query,
        key,
        value,
        # Not the module's cache: it may have been filled without gradient.
        attn_mask=module.attention_biases[:, module.attention_bias_idxs],
        scale=module.scale,
        grid_size=tuple(module.resolution),
        num_prefix_tokens=0,
    )
    if module.use_conv:
        return module.proj(mixed.transpose(-2, -1).reshape(len(x), -1, *x.shape[-2:]))
    return module.proj(_joined(mixed))


def levit_downsample(module: Any, attention: Attention, x: Tensor) -> Tensor:
    """LeViT's attention between stages: the queries are every stride-th token (arXiv 2104.01136)."""
    widths = [module.key_dim, module.val_dim]
    if module.use_conv:
        flat = module.kv(x).reshape(len(x), module.num_heads, sum(widths), -1)
        key, value = (part.transpose(-2, -1) for part in flat.split(widths, dim=2))
        query = module.q(x).reshape(len(x), module.num_heads, module.key_dim, -1).transpose(-2, -1)
    else:
        flat = module.kv(x).view(len(x), -1, module.num_heads, sum(widths)).transpose(1, 2)
        key, value = flat.split(widths, dim=-1)
        query = module.q(x).view(len(x), -1, module.num_heads, module.key_dim).transpose(1, 2)
    bias = module.attention_biases[:, module.attention_bias_idxs]
    mixed = attention(query, key, value, attn_mask=bias, scale=module.scale, num_prefix_tokens=0)
    if module.use_conv:
        height, width = (-(-size // module.stride) for size in x.shape[-2:])
        return module.proj(mixed.transpose(-2, -1).reshape(len(x), -1, height, width))
    return module.proj(_joined(mixed))


def gcvit(module: Any, attention: Attention, x: Tensor, q_global: Tensor | None = None) -> Tensor:
    """Window attention, its queries local or one set for all windows of an image (GC ViT, arXiv 2206.09959)."""
    if module.use_global and q_global is not None:
        key, value = _heads(module.qkv(x), 2, module.num_heads)
        (query,) = _heads(q_global.reshape(len(q_global), *x.shape[1:]), 1, module.num_heads)
        windows = len(x) // len(q_global)
        query = query.repeat(windows, 1, 1, 1) if _mixes_up_images() else query.repeat_interleave(windows, dim=0)
    else:
        query, key, value = _heads(module.qkv(x), 3, module.num_heads)
    mixed = attention(
        query,
        key,
        value,
        attn_mask=module.rel_pos.get_bias(),
        dropout_p=_dropout(module),
        scale=module.scale,
        grid_size=tuple(module.window_size),
        num_prefix_tokens=0,
    )
    return module.proj_drop(module.proj(_joined(mixed)))


@constant_when_traced
def _mixes_up_images() -> bool:
    """True for timm before 1.0.31, which hands the windows of a batch's images the global queries of one another."""
    version: str = importlib.import_module("timm").__version__
    return [int(part) for part in re.findall(r"\d+", version)[:3]] < [1, 0, 31]


def cait(module: Any, attention: Attention, x: Tensor) -> Tensor:
    """Talking heads (arXiv 2003.02436): heads exchange their logits, and their weights, by two H x H matrices.

    Mixed logits are plain products again: head h has the queries (L[h, 1] q_1, ..., L[h, H] q_H) to the keys of all
    heads joined, which every head shares. A constant on a head's logits leaves its softmax alone. Each head applies its
    weights to the values of all heads; the second matrix then sums. The mechanism sees the logits after the exchange.
    Costs H times the products; dropout falls on the weights before their exchange, not after.
    """
    batch, tokens, channels = x.shape
    heads = module.num_heads
    query, key, value = (part.transpose(1, 2) for part in _heads(module.qkv(x), 3, heads))  # (B, N, H, D)
    query = torch.einsum("gh,bnhd->bgnhd", module.proj_l.weight, query).flatten(3)
    mixed = attention(
        query,
        key.reshape(batch, 1, tokens, channels),
        value.reshape(batch, 1, tokens, channels),
        dropout_p=_dropout(module),
        scale=module.scale,
        enable_gqa=True,
    )
    x = torch.einsum("hg,bgnhd->bnhd", module.proj_w.weight, mixed.unflatten(-1, (heads, -1)))
    if module.proj_w.bias is not None:
        x = x + module.proj_w.bias[:, None] * value.sum(dim=1, keepdim=True)
    return module.proj_drop(module.proj(x.flatten(2)))


def mvit_v2(module: Any, attention: Attention, x: Tensor, feat_size: Any) -> tuple[Tensor, Any]:
    """Attention with pooled queries, keys and values, and offsets scored by the query (MViTv2, arXiv 2112.01526)."""
    pooled = []
    for part, pool, norm in zip(
        _heads(module.qkv(x), 3, module.num_heads),
        (module.pool_q, module.pool_k, module.pool_v),
        (module.norm_q, module.norm_k, module.norm_v),
        strict=True,
    ):
        tokens, size = _pooled(part, pool, feat_size, module.num_heads, int(module.has_cls_token))
        pooled.append((tokens if norm is None else norm(tokens), size))
    (query, q_size), (key, k_size), (value, _) = pooled
    prefix = int(module.has_cls_token)
    long_query, long_key = query * module.scale, key
    if module.rel_pos_type == "spatial":
        offsets = (_offsets(table, q, k) for table, q, k in zip(_tables(module), q_size, k_size, strict=True))
        scores = _offset_scores(query[:, :, prefix:].unflatten(2, tuple(q_size)), *offsets)
        long_query, long_key = _with_offsets(long_query, key, scores, k_size, prefix)
    grid = tuple(q_size) if tuple(q_size) == tuple(k_size) else None
    mixed = attention(long_query, long_key, value, scale=1.0, grid_size=grid, num_prefix_tokens=prefix)
    if module.residual_pooling:
        mixed = mixed + query
    return module.proj(_joined(mixed)), q_size


def sam(module: Any, attention: Attention, x: Tensor) -> Tensor:
    """Attention on a map or a window of it, with MViTv2's offsets or rotary positions (SAM, arXiv 2304.02643)."""
    size = (x.shape[1], x.shape[2])
    query, key, value = _heads(module.qkv(x.flatten(1, 2)), 3, module.num_heads)
    query, key, scale = module.q_norm(query), module.k_norm(key), module.scale
    if module.use_rel_pos:
        tables = (_resized(table, 2 * n - 1) for table, n in zip(_tables(module), size, strict=True))
        offsets = (_offsets(table, n, n) for table, n in zip(tables, size, strict=True))
        scores = _offset_scores(query.unflatten(2, size), *offsets)
        (query, key), scale = _with_offsets(query * scale, key, scores, size, 0), 1.0
    elif module.rope is not None:
        from timm.layers import apply_rot_embed_cat

        rope = module.rope.get_embed()
        query, key = (apply_rot_embed_cat(part, rope).type_as(value) for part in (query, key))
    dropout_p = _dropout(module)
    mixed = attention(query, key, value, dropout_p=dropout_p, scale=scale, grid_size=size, num_prefix_tokens=0)
    return module.proj_drop(module.proj(_joined(mixed))).unflatten(1, size)


def _pooled(x: Tensor, pool: nn.Module | None, size: Any, heads: int, prefix: int) -> tuple[Tensor, Any]:
    """Pool the tokens' map; prefix tokens stand aside. (B, H, prefix + h * w, D) and (h, w), before and after."""
    if pool is None:
        return x, size
    first, grid = x[:, :, :prefix], x[:, :, prefix:]
    channels = x.shape[-1]
    grid = pool(grid.reshape(-1, *size, channels).permute(0, 3, 1, 2).contiguous())
    new_size = [grid.shape[2], grid.shape[3]]
    grid = grid.reshape(len(x), heads, channels, -1).transpose(2, 3)
    return torch.cat((first, grid), dim=2), new_size


def _tables(module: Any) -> tuple[Tensor, Tensor]:
    return module.rel_pos_h, module.rel_pos_w


def _offset_scores(query: Tensor, table_h: Tensor, table_w: Tensor) -> Tensor:
    """(B, H, h, w, D) -> (B, H, h * w, k_h + k_w): each query's products with the vectors of its offsets to the rows of
    the keys' grid, then to its columns."""
    rows = torch.einsum("bnhwd,hkd->bnhwk", query, table_h)
    columns = torch.einsum("bnhwd,wkd->bnhwk", query, table_w)
    return torch.cat((rows, columns), dim=-1).flatten(2, 3)


def _with_offsets(query: Tensor, key: Tensor, scores: Tensor, k_size: Any, prefix: int) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products contain the offsets' scores: a key marks its row and column, a query brings what
    each row and column scores.

    So no N x M bias is formed, and mechanisms that take no bias see plain products. Prefix tokens have no place.
    """
    height, width = k_size
    row, column = (torch.eye(n, dtype=key.dtype, device=key.device) for n in (height, width))
    place = torch.cat((row.repeat_interleave(width, dim=0), column.repeat(height, 1)), dim=1)
    place = F.pad(place, (0, 0, prefix, 0)).expand(*key.shape[:2], -1, -1)
    return torch.cat((query, F.pad(scores, (0, 0, prefix, 0))), dim=-1), torch.cat((key, place), dim=-1)


def _resized(table: Tensor, offsets: int) -> Tensor:
    """The table of another image size: one row for each offset, interpolated."""
    if len(table) == offsets:
        return table
    return F.interpolate(table.T.unsqueeze(0), size=offsets, mode="linear").squeeze(0).T


def _offsets(table: Tensor, queries: int, keys: int) -> Tensor:
    """(queries, keys, D): the table's row for each offset along an axis, in steps of the finer of both grids."""
    q_step, k_step = max(keys / queries, 1.0), max(queries / keys, 1.0)
    at_query = torch.arange(queries, device=table.device).unsqueeze(1) * q_step
    at_key = torch.arange(keys, device=table.device) * k_step
    return table[(at_query - at_key + (keys - 1) * k_step).long()]


def _window(module: Any, _inputs: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(module.window_size)


def _groups(module: Any, _inputs: tuple[Any, ...]) -> tuple[int, ...]:
    return (module.ws, module.ws)


def _feature_size(_module: Any, inputs: tuple[Any, ...]) -> tuple[int, ...] | None:
    return tuple(inputs[1]) if len(inputs) > 1 else None


def _channels_first(_module: Any, inputs: tuple[Any, ...]) -> tuple[int, ...] | None:
    return tuple(inputs[0].shape[2:]) if inputs else None


def _channels_last(_module: Any, inputs: tuple[Any, ...]) -> tuple[int, ...] | None:
    return tuple(inputs[0].shape[1:-1]) if inputs else None


_QKV = ("num_heads", "qkv", "attn_drop", "proj", "proj_drop")
_LEVIT = ("use_conv", "num_heads", "key_dim", "val_dim", "scale", "attention_biases", "attention_bias_idxs", "proj")

ADAPTERS: dict[str, Adapter] = {
    "timm.models.swin_transformer_v2.WindowAttention": Adapter(
        ("x", "mask"),
        (*_QKV, "q_bias", "k_bias", "v_bias", "qkv_bias_separate", "logit_scale", "cpb_mlp", "window_size")
        + ("relative_coords_table", "relative_position_index"),
        swin_v2,
    ),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": Adapter(
        ("x", "mask"), (*_QKV, "logit_scale", "meta_mlp", "relative_coordinates_log", "window_size"), swin_v2_cr
    ),
    "timm.models.tnt.Attention": Adapter(
        ("x",), ("num_heads", "scale", "qk", "v", "attn_drop", "proj", "proj_drop"), tnt
    ),
    "timm.models.levit.Attention": Adapter(("x",), (*_LEVIT, "qkv", "resolution"), levit),
    "timm.models.levit.AttentionDownsample": Adapter(("x",), (*_LEVIT, "q", "kv", "stride"), levit_downsample),
    "timm.models.gcvit.WindowAttentionGlobal": Adapter(
        ("x", "q_global"), (*_QKV, "use_global", "rel_pos", "scale", "window_size"), gcvit
    ),
    "timm.models.cait.TalkingHeadAttn": Adapter(("x",), (*_QKV, "scale", "proj_l", "proj_w"), cait),
    "timm.models.mvitv2.MultiScaleAttention": Adapter(
        ("x", "feat_size"),
        ("num_heads", "qkv", "proj", "scale", "has_cls_token", "rel_pos_type", "residual_pooling")
        + ("pool_q", "pool_k", "pool_v", "norm_q", "norm_k", "norm_v"),
        mvit_v2,
    ),
    "timm.models.swin_transformer.WindowAttention": Adapter(("x", "mask"), ("fused_attn", "window_size"), grid=_window),
    "timm.models.visformer.Attention": Adapter(("x",), ("fused_attn",), grid=_channels_first),
    "timm.models.pvt_v2.Attention": Adapter(("x", "feat_size"), grid=_feature_size),
    "timm.models.twins.GlobalSubSampleAttn": Adapter(("x", "size"), grid=_feature_size),
    "timm.models.vision_transformer_sam.Attention": Adapter(
        ("x",), (*_QKV, "scale", "q_norm", "k_norm", "use_rel_pos", "rope"), sam
    ),
    "timm.models.twins.LocallyGroupedAttn": Adapter(("x", "size"), ("ws",), grid=_groups),
    "timm.models.maxxvit.AttentionCl": Adapter(("x", "shared_rel_pos"), grid=_channels_last),
    "timm.models.maxxvit.Attention2d": Adapter(("x", "shared_rel_pos"), grid=_channels_first),
    "timm.models.volo.Attention": Adapter(("x",), grid=_channels_last),
}

_CHANNELS = "attends channels to channels, not tokens to tokens"
_LINEAR = "is linear attention: there is no softmax over keys to select from"

# Classes that are never converted.
LEFT: dict[str, str] = {
    "timm.models.xcit.XCA": _CHANNELS,
    "timm.models.davit.ChannelAttention": _CHANNELS,
    "timm.models.davit.ChannelAttentionV2": _CHANNELS,
    "timm.models.edgenext.CrossCovarianceAttn": _CHANNELS,
    "timm.models.volo.OutlookAttention": "is outlook attention: weights come from the token itself, without keys",
    "timm.models.coat.FactorAttnConvRelPosEnc": _LINEAR,
    "timm.models.mobilevit.LinearSelfAttention": _LINEAR,
    "timm.models.convit.GPSA": "blends its softmax with a second one over positions",
    "timm.layers.lambda_layer.LambdaLayer": "is a lambda layer: keys are summed up before any query sees them",
    "timm.models.cait.ClassAttn": "is class attention: one query looks at all tokens",
    "timm.models.volo.ClassAttention": "is class attention: one query looks at all tokens",
    "timm.models.crossvit.CrossAttention": "is class attention: one query looks at the other branch's tokens",
}
