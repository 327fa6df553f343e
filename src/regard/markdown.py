"""Tables in Markdown, for the pages of figures in docs/."""

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, one line a row, with a newline at its end."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
