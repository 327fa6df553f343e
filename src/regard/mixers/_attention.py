"""The base of every attention mixer: projections, norms, gate and dropout as in timm's Attention; the mechanism is the rest."""

import copyreg
import math
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["AttentionMixer", "resolve_grid"]


def resolve_grid(tokens: int, num_prefix_tokens: int, grid_size: tuple[int, ...] | None) -> tuple[int, ...]:
    """The tokens' grid: as given, or a square inferred from the number of tokens.

    Raises:
        ValueError: prefix tokens and grid do not add up to `tokens`, or no square can be inferred.
    """
    cells = tokens - num_prefix_tokens
    if cells < 0:
        raise ValueError(f"num_prefix_tokens: {num_prefix_tokens} prefix tokens, but x has only {tokens} tokens")
    if grid_size is None:
        side = math.isqrt(cells)
        if side * side != cells:
            raise ValueError(
                f"grid_size: {tokens} tokens less {num_prefix_tokens} prefix tokens make no square grid; pass grid_size=(height, width)"
            )
        return (side, side)
    if not 1 <= len(grid_size) <= 3:
        raise ValueError(f"grid_size: expected rank 1, 2 or 3, got {tuple(grid_size)}")
    if math.prod(grid_size) != cells:
        raise ValueError(
            f"grid_size: {tuple(grid_size)} has {math.prod(grid_size)} cells, x has {tokens} tokens "
            f"of which {num_prefix_tokens} are prefix tokens"
        )
    return tuple(grid_size)


class _Bound(type):
    """Metaclass of the classes that `AttentionMixer.bind` makes; it lets them pickle, since timm keeps them in its models."""

    mixer: "type[AttentionMixer]"
    options: dict[str, Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.mixer(*args, **{**cls.options, **kwargs})


def _bound(mixer: "type[AttentionMixer]", options: dict[str, Any]) -> _Bound:
    text = ", ".join(f"{name}={value!r}" for name, value in options.items())
    members = {"mixer": mixer, "options": options, "__doc__": mixer.__doc__, "__module__": mixer.__module__}
    return _Bound(f"{mixer.__name__}({text})", (mixer,), members)


copyreg.pickle(_Bound, lambda bound: (_bound, (bound.mixer, bound.options)))  # type: ignore[arg-type, return-value]


class AttentionMixer(nn.Module):
    """Multi-head self-attention whose mechanism a subclass supplies in `attend`.

    Parameters are named as in timm's `Attention` (`qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`), so weights of dense
    attention load unchanged wherever the mechanism adds none.

    Args:
        dim: channels C of the tokens.
        num_heads: heads H.
        attn_head_dim: head dim D, dim // num_heads if None.
        dim_out: channels of the output, dim if None.
        qkv_bias, proj_bias: biases of the projections.
        qk_norm: normalise queries and keys over D with norm_layer.
        scale_norm: normalise the joined heads with norm_layer before the projection.
        gated: multiply the joined heads by sigmoid(gate(x)).
        attn_drop, proj_drop: dropout of the attention weights and of the output.
        norm_layer: class of the norms.
        num_prefix_tokens: how many of the first tokens (class, registers) stand outside the grid.

    Raises:
        ValueError: dim is no multiple of num_heads, or a norm is asked for without norm_layer.
    """

    # Whether `attend` reads the grid. Mixers that do not accept any number of tokens.
    needs_grid = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        if attn_head_dim is None and dim % num_heads != 0:
            raise ValueError(f"num_heads: dim {dim} is no multiple of {num_heads} heads; pass attn_head_dim")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer: needed by qk_norm and scale_norm")
        factory = {"device": device, "dtype": dtype}
        head_dim = attn_head_dim or dim // num_heads
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.attn_dim = num_heads * head_dim
        self.scale = head_dim**-0.5
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(head_dim, **factory) if qk_norm and norm_layer else nn.Identity()
        self.k_norm = norm_layer(head_dim, **factory) if qk_norm and norm_layer else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **factory) if scale_norm and norm_layer else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **factory) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def bind(cls, **options: Any) -> type[Self]:
        """A class like this one with options bound: what timm takes as `attn_layer`.

        timm asks `issubclass(attn_layer, ...)`, which a functools.partial cannot answer. Instances are of the class
        itself, so they pickle.
        """

        return _bound(cls, options)  # type: ignore[return-value]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid_size: tuple[int, ...] | None,
    ) -> Tensor:
        """(B, H, N, D) each -> (B, H, N, D): the mechanism. `grid_size` is None unless `needs_grid` or the caller gave it."""
        raise NotImplementedError

    @property
    def dropout_p(self) -> float:
        return self.attn_drop.p if self.training else 0.0

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grid_size: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: (B, N, C), N = num_prefix_tokens + prod(grid_size).
            attn_mask: boolean (True = attend) or floating, broadcastable to (B, H, N, N).
            is_causal: token i sees tokens 0 ... i only.
            grid_size: the grid of the tokens, of rank 1, 2 or 3; a square is inferred if it is needed and None.

        Returns:
            (B, N, dim_out).

        Raises:
            ValueError: x is not of rank 3, or the grid does not fit.
        """
        if x.dim() != 3:
            raise ValueError(f"x: expected (batch, tokens, channels), got shape {tuple(x.shape)}")
        batch, tokens, _ = x.shape
        if self.needs_grid or grid_size is not None:
            grid_size = resolve_grid(tokens, self.num_prefix_tokens, grid_size)
        gate = torch.sigmoid(self.gate(x)) if self.gate is not None else None
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        mixed = self.attend(query, key, value, attn_mask, is_causal, grid_size)
        mixed = self.norm(mixed.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        if gate is not None:
            mixed = mixed * gate
        return self.proj_drop(self.proj(mixed))
