"""The templates of pages, and how numbers and names read in them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from allot.report.explanation import number
from allot.report.layers import macs_kept
from allot.report.scores import change_text, score_text
from allot.report.table import check_text


@cache  # compiling takes longer than all of a small run
def template(name: str) -> jinja2.Template:
    """A template beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "number": number,
        "percent": percent,
        "score": score_text,
        "change": lambda scores: change_text(scores["dense"], scores["sparse"], scores),
        "check_text": check_text,
        "macs_kept": macs_kept,
        "folding": lambda name: Markup(".<wbr>").join(escape(part) for part in str(name).split(".")),
        "arrows": lambda text: str(text).replace("->", "\u2192"),
        "plural": lambda count, noun: f"{count:,} {noun}{'' if count == 1 else 's'}",
    }
    return environment.get_template(name)


def percent(share: float) -> str:
    """A share in percent.

    >>> percent(0.1234)
    '12.3 %'
    """
    return f"{100 * share:.1f} %"
