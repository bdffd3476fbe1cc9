"""Options of the verbs, made from the fields of `RecipeFile`: each is declared there, and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from allot.cli.named_code import check_recipe
from allot.cli.names import allocator_names, check_names, method_names, models, repair_names, score_names
from allot.cli.recipe import COMPUTE, NO_MODEL, Option, RecipeFile
from allot.errors import UsageError

WHAT, BUDGET, METHOD = "What is pruned", "Budget and guarantees", "Method"
DATA, SPEED, OUTPUT = "Data", "Speed and memory", "Output"
CHAIN = ("method", "allocate", "score", "pattern", "repair", "runtime")
RULES = ("include", "exclude", "min_density", "max_density", "floor")
SCORING = ("test", "metric", "max_drop")
READING = ("samples", "batch_size", "workers", "skip_corrupt")
LIMITS = (
    "outputs", "loss", "batch_norm", "views", "max_minutes", "max_steps", "stream", "device", "max_memory", *COMPUTE
)  # fmt: skip
_PANELS = {
    WHAT: ("weights", *RULES),
    BUDGET: ("budget", "max_drop", "min_fidelity"),
    METHOD: ("method", "allocate", "score", "pattern", "repair", "outputs", "loss", "batch_norm", "views", "max_steps",
             "seed", "recipe", "settings"),
    DATA: ("data", "test", "metric", "input", "samples", "batch_size", "workers", "skip_corrupt"),
    SPEED: ("max_minutes", "runtime", "device", "stream", "max_memory", *COMPUTE),
}  # fmt: skip
_COMPLETED = {
    "model": models, "method": method_names, "allocate": allocator_names, "repair": repair_names, "score": score_names,
    "data": models, "test": models,
}  # fmt: skip


def place(text: str | Path) -> Path:
    """A path that the user typed: not an empty text, which `Path` reads as the current directory."""
    if not str(text).strip():
        raise typer.BadParameter("an empty text is no path")
    return Path(text)


def option(help: str, *flags: str, panel: str = OUTPUT, **settings: Any) -> Any:  # noqa: A002 - as typer calls it
    """An option in a panel of `--help`; brackets in its help are no markup."""
    return typer.Option(*flags, help=escape(help), rich_help_panel=panel, **settings)


Json = Annotated[bool, option("one JSON object on standard output", "--json")]
RunModel = Annotated[
    str | None,
    option("the model of the run, if it is code: the same forms as in prune", "--model", metavar="MODEL", panel=WHAT),
]
_FILE = option(
    "the same as these options, in a file; or see `allot recipes`", "--recipe", metavar="FILE.yaml|NAME", panel=METHOD,
    is_eager=True,
)  # fmt: skip
_SETTINGS = option("override one key of the recipe; repeatable", "--set", metavar="A.B=C", panel=METHOD)


def takes(*keys: str, file: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator of commands: these keys of a recipe become options, and the recipe the first argument.

    Names and files of the recipe are checked before the command begins.

    Args:
        keys: fields of `RecipeFile`, or choices of `COMPUTE`; `model` is a positional argument, which the recipe may
            give instead.
        file: whether the command also takes `--recipe` and `--set`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**arguments: Any) -> None:
            given = {key: arguments.pop(key) for key in keys}
            path, settings = arguments.pop("recipe", None), arguments.pop("settings", None)
            compute = [f"compute.{key}={given[key]}" for key in COMPUTE.keys() & keys if given[key] is not None]
            fields = {key: value for key, value in given.items() if key not in COMPUTE}
            settings = [*compute, *(settings or ())]
            wanted = RecipeFile.resolve(path, fields, settings, needs_model="model" in keys)
            if path is not None:
                check_recipe(path, wanted, RecipeFile.resolve(None, fields, settings))
            check_names(wanted)
            command(wanted, **arguments)

        others = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [_parameter(key, _annotation(key)) for key in keys]
        if file:
            parameters.append(_parameter("recipe", Annotated[Path | None, _FILE]))
            parameters.append(_parameter("settings", Annotated[list[str] | None, _SETTINGS]))
        parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in others]
        parameters.sort(key=_panel_number)
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _panel_number(parameter: inspect.Parameter) -> int:
    """Where a parameter stands in the help: arguments, then the panels in order."""
    panel = getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None)
    return 0 if panel is None else 1 + [*_PANELS, OUTPUT].index(panel)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _annotation(key: str) -> Any:
    declared = COMPUTE[key] if key in COMPUTE else _declared(key)
    completed = _starting_with(_COMPLETED[key]) if key in _COMPLETED else None
    if key == "model":
        argument = typer.Argument(
            metavar=declared.metavar, help=escape(declared.help), callback=_model_first, is_eager=True,
            autocompletion=completed,
        )  # fmt: skip
        return Annotated[str | None, argument]
    panel = next(panel for panel, keys in _PANELS.items() if key in keys)
    flag = "--" + key.replace("_", "-")
    if declared.kind is bool:
        return Annotated[bool | None, option(declared.help, flag, panel=panel)]
    completing = {"metavar": declared.metavar, "autocompletion": completed}
    return Annotated[declared.kind | None, option(declared.help, flag, panel=panel, **completing)]


def _model_first(context: typer.Context, model: str | None) -> str | None:
    """Raises:
    UsageError: neither MODEL nor a recipe is given, which is said before other values are read.
    """
    if model is None and not context.params.get("recipe") and not context.resilient_parsing:
        raise UsageError(f"{NO_MODEL[:-1]} (`{context.command_path} --help` shows examples).")
    return model


def _starting_with(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def _declared(key: str) -> Option:
    return next(entry for entry in RecipeFile.model_fields[key].metadata if isinstance(entry, Option))
