"""Options of the verbs, made from the fields of `RecipeFile`: each is declared there, and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from allot.cli.named_code import check_recipe
from allot.cli.recipe import COMPUTE, Option, RecipeFile


def place(text: str | Path) -> Path:
    """A path that the user typed: not an empty text, which `Path` reads as the current directory."""
    if not str(text).strip():
        raise typer.BadParameter("an empty text is no path")
    return Path(text)


Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
RunModel = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="the model of the run, if it is code: the same forms as in prune"),
]
_FILE = Annotated[
    Path | None,
    typer.Option(
        "--recipe", metavar="FILE.yaml|NAME", help="the same as these options, in a file; or see `allot recipes`"
    ),
]
_SETTINGS = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="override one key of the recipe; repeatable")
]
CHAIN = ("method", "allocate", "score", "pattern", "repair", "runtime")
RULES = ("include", "exclude", "min_density", "max_density", "floor")
SCORING = ("test", "metric", "max_drop")
READING = ("samples", "batch_size", "workers", "skip_corrupt")
LIMITS = (
    "outputs", "loss", "batch_norm", "views", "max_minutes", "max_steps", "stream", "device", "max_memory", *COMPUTE
)  # fmt: skip


def takes(*keys: str, file: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator of commands: these keys of a recipe become options, and the recipe the first argument.

    Args:
        keys: fields of `RecipeFile`, or choices of `COMPUTE`; `model` is a positional argument.
        file: whether the command also takes `--recipe` and `--set`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**arguments: Any) -> None:
            given = {key: arguments.pop(key) for key in keys}
            path, settings = arguments.pop("recipe", None), arguments.pop("settings", None)
            compute = [f"compute.{key}={given[key]}" for key in COMPUTE.keys() & keys if given[key] is not None]
            fields = {key: value for key, value in given.items() if key not in COMPUTE}
            settings = [*compute, *(settings or ())]
            wanted = RecipeFile.resolve(path, fields, settings)
            if path is not None:
                check_recipe(path, wanted, RecipeFile.resolve(None, fields, settings))
            command(wanted, **arguments)

        others = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [_parameter(key, _annotation(key)) for key in keys]
        if file:
            parameters += [_parameter("recipe", _FILE), _parameter("settings", _SETTINGS)]
        parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in others]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _annotation(key: str) -> Any:
    option = COMPUTE[key] if key in COMPUTE else _declared(key)
    if key == "model":
        return Annotated[str | None, typer.Argument(metavar=option.metavar, help=option.help)]
    flag = "--" + key.replace("_", "-")
    if option.kind is bool:
        return Annotated[bool | None, typer.Option(flag, help=option.help)]
    return Annotated[option.kind | None, typer.Option(flag, metavar=option.metavar, help=option.help)]


def _declared(key: str) -> Option:
    return next(entry for entry in RecipeFile.model_fields[key].metadata if isinstance(entry, Option))
