"""A result as a card in a notebook: the headline, what was promised and met, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from allot.report.fidelity import warnings
from allot.report.headline import Headline

_COLOURS = {"close": "#2e7d32", "loss": "#b26a00", "far": "#c62828", "": "#607d8b"}  # seen on light and on dark
_CARD = Markup(
    '<div style="border-left:4px solid {colour};padding:.4em .9em;max-width:46em;font-family:sans-serif">'
    '<div style="font-weight:600">{title}</div><div style="font-size:1.1em;margin:.2em 0 .4em">{headline}</div>'
    '{lines}<div style="opacity:.7;font-size:.9em">{where}</div></div>'
)
_LINE = Markup('<div style="font-size:.9em;color:{}">{}</div>')


def card(report: Mapping[str, Any], directory: object = None) -> str:
    """The card of a report, as HTML; its text is escaped, and it needs no network.

    Args:
        directory: of the run, where it was saved.
    """
    found = Headline.of(report)
    lines = [_LINE.format("inherit", _limit_text(row)) for row in report["budget"]]
    lines += [_LINE.format("inherit" if row["met"] else _COLOURS["far"], row["text"]) for row in report["guarantees"]]
    lines += [_LINE.format(_COLOURS["loss"], line) for line in warnings(report)]
    where = f"saved in {directory}: report.html shows every layer" if directory else "not saved: result.save(directory)"
    content = _CARD.format(
        colour=_COLOURS[found.grade],
        title=f"{report['model']}, pruned by {report['method']}",
        headline=str(found),
        lines=Markup("").join(lines),
        where=where,
    )
    return str(content)


def _limit_text(row: Mapping[str, Any]) -> str:
    return f"budget {row['kind']}={row['asked']}: {'met' if row['met'] else 'MISSED'}"
