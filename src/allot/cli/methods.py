"""Methods and recipes described: in plain words, or with all that their docstrings say."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from allot.cli.console import people, print_json, say
from allot.cli.option_words import words_of
from allot.errors import unknown
from allot.methods import METHODS, RECIPES, VARIANTS
from allot.pruning.assemble import options_of
from allot.report import table
from allot.run.problem import Rule
from allot.run.recipes import Recipe

# the section of a docstring that describes a method's state, which is for developers
_STATE = re.compile(r"^State:\n(?:(?: .*)?\n)*(?: .*\Z)?", re.MULTILINE)
_SECTION = re.compile(r"^(Args|Raises|State|Differences[^\n]*):\n", re.MULTILINE)
_USUAL = {"score": Recipe.score, "pattern": Recipe.pattern}
_INDENT = " " * 8


def methods_command(name: str | None, *, paper: bool, as_json: bool) -> None:
    """Show the methods, or one of them.

    Args:
        paper: whether equations, citation and differences from the paper are shown as well.
    Raises:
        UsageError: no method or recipe is called so.
    """
    if name is None:
        methods = {key: describe_method(key) for key in METHODS}
        if as_json:
            return print_json({"methods": methods, "recipes": {k: dataclasses.asdict(r) for k, r in RECIPES.items()}})
        rows = [(key, m["role"], m["needs"].removeprefix("calibration "), m["summary"]) for key, m in methods.items()]
        people.print(table.methods_table(rows))
        for key, recipe in RECIPES.items():
            say(f"--method {key}: allocate {recipe.allocate}, repair {', '.join(recipe.repair) or 'none'}")
    elif name in METHODS:
        method = describe_method(name)
        if as_json:
            return print_json(method)
        say(f"{name}: {method['role']}, needs {method['needs']}")
        say(method["text"] if paper else method["plain"])
        for line in _option_lines(name, method["options"]):
            say(line)
        if not paper:
            say(f"equations, citation, and what differs from the paper: allot methods {name} --paper")
    elif name in RECIPES:
        if as_json:
            return print_json(dataclasses.asdict(RECIPES[name]))
        for line in _recipe_lines(name, RECIPES[name]):
            say(line)
    else:
        raise unknown("method", name, {*METHODS, *RECIPES})
    return None


def describe_method(name: str) -> dict[str, Any]:
    """The docstrings and options of a method: `{role, needs, summary, plain, text, options}`.

    `plain` is the summary and what the class says before its arguments; `text` is everything.
    """
    method: Any = METHODS[name]
    documented = method.densities if isinstance(method, Rule) else type(method)
    text = "\n\n".join((inspect.getdoc(documented) or "", inspect.getdoc(inspect.getmodule(documented)) or ""))
    first, _, rest = _SECTION.split(inspect.getdoc(documented) or "")[0].strip().partition("\n")
    summary = VARIANTS.get(name, first)
    return {
        "role": method.role,
        "needs": "calibration data" if method.needs_data else "no data",
        "summary": summary,
        "plain": "\n".join((summary, rest)).rstrip(),
        "text": _STATE.sub("", text),
        "options": options_of(method),
    }


def _option_lines(name: str, options: dict[str, Any]) -> Iterator[str]:
    """For each option the line that sets its default, and below it what it is and when to change it."""
    width = max(40, people.width)
    for option, default in options.items():
        yield f"  --set options.{name}.{option}={default if isinstance(default, str) else json.dumps(default)}"
        words = words_of(METHODS[name], option)
        yield textwrap.fill(words, width, initial_indent=_INDENT, subsequent_indent=_INDENT)


def _recipe_lines(name: str, recipe: Recipe) -> Iterator[str]:
    """A recipe as options, and what each of its parts does."""
    parts = f"--allocate {recipe.allocate} --repair {','.join(recipe.repair) or 'none'}"
    others = {key: getattr(recipe, key) for key in ("score", "pattern") if getattr(recipe, key) != _USUAL[key]}
    parts += "".join(f" --{key} {value}" for key, value in others.items())
    for part, options in recipe.options.items():
        parts += "".join(f" --set options.{part}.{option}={json.dumps(options[option])}" for option in options)
    parts += f" (--score {recipe.score_alone} where no repair chooses masks)" if recipe.score_alone else ""
    yield f"--method {name}: {parts}; see `allot methods PART`"
    for part in (recipe.allocate, *recipe.repair):
        yield f"  {part}: {describe_method(part)['summary']}"
