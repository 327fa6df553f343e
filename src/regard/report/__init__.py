"""What a study found, as a table in the terminal and one self-contained HTML page. Reads regard.results alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# matplotlib and jinja2 take half a second to import: names come at first use.
_EXPORTS = {
    "Summary": "regard.report.summary",
    "render_page": "regard.report.page",
    "summarise": "regard.report.summary",
    "summary_picture": "regard.report.picture",
    "terminal_table": "regard.report.tables",
    "write_report": "regard.report.page",
}

__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from regard.report.page import render_page as render_page
    from regard.report.page import write_report as write_report
    from regard.report.picture import summary_picture as summary_picture
    from regard.report.summary import Summary as Summary
    from regard.report.summary import summarise as summarise
    from regard.report.tables import terminal_table as terminal_table


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'regard.report' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
