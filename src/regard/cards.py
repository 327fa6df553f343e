"""Cards: what is known of each published mechanism; docs, `regard list` and the test matrix are made from them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from regard.markdown import markdown_table

__all__ = ["Card", "Evidence", "table"]


@dataclass(frozen=True)
class Evidence:
    """What this repository holds to show that a mechanism is what its paper says.

    Args:
        identities: identities that the tests prove, one short sentence each.
        parity: which official implementation the outputs agree with, and how closely; empty if there is none.
        parameters: published parameter counts that ours equal to the last digit, by model name.
        trained: where a trained result of ours stands.
    """

    identities: tuple[str, ...] = ()
    parity: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    trained: str = ""


@dataclass(frozen=True)
class Card:
    """One mechanism's card.

    Args:
        name: the name in text form (`knn`).
        title: what the paper calls it.
        paper: the paper's title.
        authors: first author and others.
        venue: where it was published, with the year.
        arxiv: arXiv identifier (`2106.00515`), empty if there is none.
        exact: True if it computes its own definition exactly, False if it approximates it.
        cost: growth of the cost in the number of tokens N, as text.
        needs_grid: True if it must know the tokens' grid.
        adds_parameters: True if its state_dict differs from dense attention's.
        summary: one sentence: which keys, how strongly, what do they hand over.
        equation: the mechanism in LaTeX, one output row.
        modifies: True if it is no mechanism but changes a model around one.
        converts: True if a trained dense model can be converted to it; False if it needs weights of its own.
        query_masks: True if masks may differ between queries (and be biases, or causal); False if they only hide keys.
        causal: True if is_causal is taken although masks only hide keys.
        variants: the published variants, and which of them this is, one paragraph each.
        claims: what the paper claims, with its figures, one paragraph each.
        claims_source: where the claims stand.
        official: the official implementation (owner/name), empty if there is none.
        licence: licence of the official implementation.
        quirks: where the official code departs from its paper or fails, one sentence each.
        evidence: what is shown here.
    """

    name: str
    title: str
    paper: str
    authors: str
    venue: str
    arxiv: str
    exact: bool
    cost: str
    needs_grid: bool
    adds_parameters: bool
    summary: str
    equation: str = ""
    modifies: bool = False
    converts: bool = True
    query_masks: bool = True
    causal: bool = False
    variants: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    claims_source: str = "the paper"
    official: str = ""
    licence: str = ""
    quirks: tuple[str, ...] = ()
    evidence: Evidence = Evidence()

    @property
    def paper_link(self) -> str:
        """The paper's address, empty if it has no arXiv id."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


# Heading of the table and what a card holds under it.
_COLUMNS: dict[str, Callable[[Card], str]] = {
    "name": lambda card: f"`… + {card.name}`" if card.modifies else f"`{card.name}`",
    "mechanism": lambda card: card.title,
    "which keys, how strongly": lambda card: card.summary,
    "own definition": lambda card: "exact" if card.exact else "approximate",
    "cost in N tokens": lambda card: card.cost,
    "grid": lambda card: "needed" if card.needs_grid else "no",
    "dense weights load": lambda card: "with new ones" if card.adds_parameters else "unchanged",
    "masks": lambda card: "any" if card.query_masks else "hide keys, or causal" if card.causal else "hide keys",
    "paper": lambda card: f"[{card.arxiv}]({card.paper_link}), {card.venue}" if card.arxiv else card.venue,
}
_SHORT = ("name", "mechanism", "which keys, how strongly", "paper")


def table(cards: Iterable[Card], *, pages: str | None = None, short: bool = False) -> str:
    """The mechanisms' table in Markdown, one row a card.

    Args:
        cards: in the order of the rows.
        pages: where the mechanisms' pages stand; each name becomes a link to `<pages>/<name>.md`.
        short: only what says what each is.
    """
    columns = {heading: cell for heading, cell in _COLUMNS.items() if not short or heading in _SHORT}
    rows = []
    for card in cards:
        row = [cell(card) for cell in columns.values()]
        if pages is not None:
            row[0] = f"[{row[0]}]({pages}/{card.name}.md)"
        rows.append([text.replace("|", "\\|") for text in row])
    return markdown_table(list(columns), rows)
