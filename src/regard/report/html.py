"""What all pages share: how templates are filled, and settings as pairs."""

from typing import Any

from jinja2 import Environment as Templates
from jinja2 import PackageLoader, StrictUndefined

from regard.results import Environment

__all__ = ["fill", "pairs"]


def fill(template: str, maker: Environment, **values: Any) -> str:
    """A page's HTML.

    Args:
        template: name of a file in templates/ that extends page.html.j2.
        maker: where the page's figures were measured; its version and commit stand at the foot.
    """
    templates = Templates(
        loader=PackageLoader("regard.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(maker=maker, **values)


def pairs(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text."""
    return [(name.replace("_", " "), _text(value)) for name, value in fields.items()]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(one)}" for name, one in value.items())
    return str(value) if value not in ("", None) else "–"
