"""The base of every attention mixer: projections, norms, gate and dropout as in timm; the mechanism is the rest."""

import copyreg
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.auxiliary import Reporter
from regard.specs import Mechanism, nearest

__all__ = ["GATES", "AttentionMixer", "MechanismMixer", "check_gated", "resolve_grid"]

GATES = ("elementwise", "headwise")

# Value columns read in one call of the mechanism; kernels take head dims of 8 to 256.
_WIDEST, _NARROWEST = 256, 8


def resolve_grid(tokens: int, num_prefix_tokens: int, grid_size: Sequence[int] | None) -> tuple[int, ...]:
    """The tokens' grid: as given, or a square inferred from the number of tokens.

    Args:
        tokens: N, prefix tokens included.
        num_prefix_tokens: how many of them stand outside the grid.
        grid_size: the grid of the others, of rank 1, 2 or 3; None infers a square.

    Raises:
        TypeError: grid_size is no sequence of integers.
        ValueError: prefix tokens and grid do not add up to `tokens`, or no square can be inferred.
    """
    cells = tokens - num_prefix_tokens
    if cells < 0:
        raise ValueError(f"num_prefix_tokens: {num_prefix_tokens} prefix tokens, but x has only {tokens} tokens")
    if grid_size is None:
        side = math.isqrt(cells)
        if side * side != cells:
            raise ValueError(
                f"grid_size: {tokens} tokens less {num_prefix_tokens} prefix tokens make no square grid; "
                "pass grid_size=(height, width), or set num_prefix_tokens"
            )
        return (side, side)
    if not isinstance(grid_size, Sequence) or not all(
        isinstance(n, numbers.Integral | torch.SymInt) for n in grid_size
    ):
        raise TypeError(f"grid_size: expected integers such as (height, width), got {grid_size!r}")
    grid = tuple(grid_size)
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"grid_size: expected rank 1, 2 or 3, got {grid}")
    if any(n < 0 for n in grid) or math.prod(grid) != cells:
        raise ValueError(
            f"grid_size: {grid} is no grid of {cells} cells; x has {tokens} tokens, "
            f"of which {num_prefix_tokens} are prefix tokens"
        )
    return grid


def check_gated(gated: bool | str) -> None:
    """Raise unless `gated` is a bool or one of GATES.

    Raises:
        ValueError: another text. TypeError: neither bool nor text.
    """
    if not isinstance(gated, bool | str):
        raise TypeError(f"gated: expected a bool or one of {', '.join(GATES)}, got {type(gated).__name__}")
    if isinstance(gated, str) and gated not in GATES:
        raise ValueError(f"gated: expected a bool or one of {', '.join(GATES)}, got {gated!r}")


class _Bound(type):
    """Metaclass of the classes that `AttentionMixer.bind` makes: to call one makes an instance of the mixer itself.

    Pickle refers to a class by its name, and these have none; so they pickle as the call that made them (timm keeps its
    `attn_layer` in some models).
    """

    mixer: "type[AttentionMixer]"
    options: dict[str, Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        options = {**cls.options, **kwargs}
        if "mixer" in cls.__dict__:
            return cls.mixer(*args, **options)
        return super().__call__(*args, **options)  # somebody's subclass of a bound class makes its own instances


def _bound(mixer: "type[AttentionMixer]", options: dict[str, Any]) -> _Bound:
    text = ", ".join(f"{name}={value!r}" for name, value in options.items())
    members = {"mixer": mixer, "options": options, "__doc__": mixer.__doc__, "__module__": mixer.__module__}
    return _Bound(f"{mixer.__name__}({text})", (mixer,), members)


def _reduce_bound(cls: _Bound) -> Any:
    return (_bound, (cls.mixer, cls.options)) if "mixer" in cls.__dict__ else cls.__qualname__


copyreg.pickle(_Bound, _reduce_bound)  # type: ignore[arg-type]


def _option_names(mixer: "type[AttentionMixer]") -> set[str]:
    """The keywords that a mixer's constructor takes, wherever along its bases they are declared."""
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        parameter.name
        for base in mixer.__mro__
        if issubclass(base, AttentionMixer)
        for parameter in inspect.signature(base.__init__).parameters.values()
        if parameter.kind in keyword and parameter.name != "self"
    }


class AttentionMixer(Reporter, nn.Module):
    """Multi-head self-attention whose mechanism a subclass supplies in `attend` (or, between other tokens, in `mix`).

    Parameters are named as in timm's `Attention` (`qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`), so weights of
    dense attention load unchanged wherever the mechanism adds none. The arguments are timm's too, in timm's order.

    Args:
        dim: channels C of the tokens.
        num_heads: heads H.
        attn_head_dim: head dim D, dim // num_heads if None.
        dim_out: channels of the output, dim if None.
        qkv_bias, proj_bias: biases of the projections.
        qk_norm: normalise queries and keys over D with norm_layer.
        scale_norm: normalise the joined heads with norm_layer before the projection.
        gated: multiply the joined heads by sigmoid(gate(x)), as in gated attention (arXiv 2505.06708): 'elementwise'
            (or True, as timm has it) with one gate a channel, 'headwise' with one a head.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
        norm_layer: makes a norm of a number of channels.
        device, dtype: of the parameters.
        num_prefix_tokens: how many of the first tokens (class, registers) stand outside the grid.
        scale: factor of the logits, D^-0.5 if None.

    Raises:
        ValueError: dim, num_heads, attn_head_dim, dim_out or num_prefix_tokens is out of range, dim is no multiple of
            num_heads, a norm is asked for without norm_layer, or gated is an unknown kind.
        TypeError: gated is neither bool nor text.
    """

    # True if `attend` reads the grid; it is then always given one.
    needs_grid: ClassVar[bool] = False
    # True if each row of weights is softmax over those of its logits q.k * scale that `kept_keys` picks, q and k being
    # what q_norm and k_norm return.
    row_wise: bool = False

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
        gated: bool | str = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_prefix_tokens: int = 0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_heads": num_heads, "attn_head_dim": attn_head_dim, "dim_out": dim_out}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens: expected 0 or more, got {num_prefix_tokens}")
        if attn_head_dim is None and dim % num_heads != 0:
            raise ValueError(f"num_heads: dim {dim} is no multiple of {num_heads} heads; pass attn_head_dim")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer: qk_norm and scale_norm need one, such as torch.nn.LayerNorm; got None")
        check_gated(gated)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        head_dim = attn_head_dim or dim // num_heads
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.attn_dim = num_heads * head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        # Every mechanism scales its logits by D^-0.5, so that another scale is a factor of the queries.
        self.query_factor = 1.0 if scale is None else scale * head_dim**0.5
        self.sources: nn.Module | None = None  # see `project_from`
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(head_dim, **factory) if qk_norm and norm_layer else nn.Identity()
        self.k_norm = norm_layer(head_dim, **factory) if qk_norm and norm_layer else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **factory) if scale_norm and norm_layer else nn.Identity()
        gates = num_heads if gated == "headwise" else self.attn_dim
        self.gate = nn.Linear(dim, gates, bias=qkv_bias, **factory) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def bind(cls, **options: Any) -> type[Self]:
        """A class like this one with options bound: what timm takes as `attn_layer`.

        timm asks `issubclass(attn_layer, ...)`, which a functools.partial cannot answer; otherwise it behaves like one:
        arguments given later win, so options that timm passes by itself (qkv_bias, qk_norm, norm_layer, attn_drop ...)
        are set through timm. Calling the class makes an instance of the mixer itself.

        Raises:
            TypeError: an option that the constructor does not take.
        """
        known = _option_names(cls)
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__}: no option {name!r}; its options: {', '.join(nearest(name, known))}")
        if isinstance(cls, _Bound) and "mixer" in cls.__dict__:
            return _bound(cls.mixer, {**cls.options, **options})  # type: ignore[return-value]
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
        """(B, H, N, D) each -> (B, H, N, D): the mechanism.

        Must be linear in `value` (`attention_weights` reads them off an identity). `grid_size` is None unless
        `needs_grid` or the caller gave it; dropout of the weights is `self.dropout_p`.
        """
        raise NotImplementedError

    def kept_keys(self, logits: Tensor) -> Tensor | None:
        """(B, H, n, M) logits of some queries, hidden keys -inf -> which keys each keeps, boolean; None: all others.

        Asked of `row_wise` mechanisms only, by what looks at some rows of weights at a time.
        """
        return None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> queries, keys and values, (B, H, N, D) each, normed as asked for."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return self.normed_query(query), self.k_norm(key), value

    def normed_query(self, query: Tensor) -> Tensor:
        """(B, H, N, D): queries as `attend` takes them, normed and scaled as asked for."""
        query = self.q_norm(query)
        return query if self.query_factor == 1.0 else query * self.query_factor

    def project_from(self, sources: nn.Module) -> None:
        """Project queries, keys and values from tokens that `sources` makes of x, no longer from x.

        Args:
            sources: (x, grid_size) -> tokens (B, N, C) for the queries, (B, M, C) each for the keys and values, and
                the keys' grid, which `attend` is then given. The first num_prefix_tokens of each are prefix tokens.

        Raises:
            ValueError: this mechanism makes its keys from x itself.
        """
        if type(self).mix is not AttentionMixer.mix or type(self).heads is not AttentionMixer.heads:
            raise ValueError(
                f"attn_layer: {type(self).__name__} makes its keys from the tokens themselves, so no other projection "
                "can supply them; choose a mechanism between given queries, keys and values, such as KNNAttention"
            )
        self.sources = sources

    def projected(
        self, x: Tensor, grid_size: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...] | None]:
        """(B, N, C) -> queries, keys and values as `attend` takes them, and the keys' grid where it is known."""
        if self.sources is None:
            return *self.heads(x), grid_size
        *tokens, grid_size = self.sources(x, grid_size)
        weights = self.qkv.weight.split(self.attn_dim)
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.split(self.attn_dim)
        query, key, value = (
            F.linear(part, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part, weight, bias in zip(tokens, weights, biases, strict=True)
        )
        return self.normed_query(query), self.k_norm(key), value, grid_size

    def mix(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, grid_size: tuple[int, ...] | None) -> Tensor:
        """(B, N, C) -> (B, H, N, D): the mechanism between the tokens and the output's norm, gate and projection.

        A mechanism whose keys are not a projection of each token overrides this, and `attention_weights` with it.
        """
        query, key, value, grid_size = self.projected(x, grid_size)
        return self.attend(query, key, value, attn_mask, is_causal, grid_size)

    def attention_weights(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grid_size: tuple[int, ...] | None = None,
    ) -> Tensor:
        """(B, H, N, N): the weights with which `forward`, called likewise, mixes its tokens; row i is query i's.

        (B, H, N, M) where the keys are M other tokens (`project_from`).

        Attention is linear in its values, so identity values hand back the weights, some columns at a time.
        """
        grid_size = self._grid(x, grid_size)
        query, key, _, grid_size = self.projected(x, grid_size)
        batch, heads, keys, _ = key.shape
        parts = []
        for columns in torch.eye(keys, device=key.device, dtype=key.dtype).split(_WIDEST, dim=1):
            width = columns.shape[1]
            value = nn.functional.pad(columns, (0, max(_NARROWEST - width, 0)))
            value = value.expand(batch, heads, *value.shape)
            parts.append(self.attend(query, key, value, attn_mask, is_causal, grid_size)[..., :width])
        return torch.cat(parts, dim=-1)

    @property
    def dropout_p(self) -> float:
        """Dropout of the attention weights that is in force now."""
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
            attn_mask: boolean (True = attend) or floating (added to the logits), broadcastable to (B, H, N, N).
            is_causal: token i sees tokens 0 ... i only. Combines with attn_mask.
            grid_size: the grid of the tokens, of rank 1, 2 or 3; a square is inferred if it is needed and None.

        Returns:
            (B, N, dim_out).

        Raises:
            ValueError: x is not (B, N, C), or the grid does not fit.
            TypeError: grid_size is no sequence of integers.
        """
        grid_size = self._grid(x, grid_size)
        gate = torch.sigmoid(self.gate(x)) if self.gate is not None else None
        mixed = self.mix(x, attn_mask, is_causal, grid_size)
        mixed = self.norm(mixed.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))
        if gate is not None:
            mixed = (mixed.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(2)
        return self.proj_drop(self.proj(mixed))

    def _grid(self, x: Tensor, grid_size: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """The tokens' grid where it is needed or given, once x is known to be one that this mixer takes."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected (batch, tokens, {self.dim}), got shape {tuple(x.shape)}")
        if not self.needs_grid and grid_size is None:
            return None
        return resolve_grid(x.shape[1], self.num_prefix_tokens, grid_size)


class MechanismMixer(AttentionMixer):
    """A mixer that attends as its mechanism's value does. A subclass's constructor makes the value, `mechanism`."""

    mechanism: Mechanism

    def extra_repr(self) -> str:
        return str(self.mechanism)

    def attend_options(self) -> dict[str, Any]:
        """What the mechanism's `attend` is told of parameters that the mixer adds."""
        return {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        grid_size: tuple[int, ...] | None,
    ) -> Tensor:
        return self.mechanism.attend(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=self.dropout_p,
            is_causal=is_causal,
            num_prefix_tokens=self.num_prefix_tokens,
            grid_size=grid_size,
            **self.attend_options(),
        )
