"""The one rule that says which keys a query of neighborhood attention sees along an axis."""

__all__ = ["group_lengths", "window_bounds"]


def window_bounds(index: int, length: int, window: int, stride: int = 1, is_causal: bool = False) -> tuple[int, int]:
    """The keys start <= j < end that query `index` sees along one axis of `length` tokens.

    `stride` queries in a row share the window of their leader: the middle one, right of it if they are an even number;
    the last one if causal. The window has `window // 2` keys left of the leader and is moved, never shrunk, at the
    borders. If causal it ends at the query itself, so it is shorter at the start and for queries before their leader.
    (Neighborhood attention, arXiv 2204.07143; stride: generalized neighborhood attention, arXiv 2504.16922.)

    With dilation d the axis falls apart into d interleaved groups (see `group_lengths`); `index` and `length` are then
    those within a group.
    """
    first = index // stride * stride
    if is_causal:
        leader = min(first + stride - 1, length - 1)
        return max(leader - window + 1, 0), index + 1
    leader = min(first + stride // 2, length - 1)
    start = min(max(leader - window // 2, 0), length - window)
    return start, start + window


def group_lengths(length: int, dilation: int) -> list[tuple[int, int]]:
    """How long the interleaved groups of an axis are, and how many are that long: [(tokens, groups), ...]."""
    short, longer = divmod(length, dilation)
    found = [(short + 1, longer), (short, dilation - longer)]
    return [(tokens, groups) for tokens, groups in found if tokens and groups]
