"""A recipe file: what `allot prune` says on the command line, as YAML that is checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from allot.budget.budget import Budget
from allot.budget.units import memory
from allot.errors import UsageError, unknown
from allot.network.compute import Compute
from allot.network.layers import Rules


class RecipeFile(BaseModel):
    """Everything that decides a run. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    weights: str | None = None
    data: str | None = None
    test: str | None = None
    input: tuple[Annotated[int, Field(gt=0)], ...] | None = None
    budget: tuple[str, ...] = ()
    method: str = "erk"
    allocate: str | None = None
    score: str | None = None
    pattern: str | None = None
    repair: str | None = None
    runtime: str | None = None
    options: dict[str, dict[str, Any]] = {}
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_density: dict[str, float] = {}
    max_density: dict[str, float] = {}
    floor: int | str = 1
    seed: int = 0
    samples: int = 512
    batch_size: int = 64
    workers: Annotated[int, Field(ge=0)] = 0
    skip_corrupt: bool = False
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    stream: str | None = None
    compute: dict[str, Any] = {}
    max_memory: int | str | None = None
    device: str | None = None

    @field_validator("compute")
    @classmethod
    def _choices_that_there_are(cls, value: dict[str, Any]) -> dict[str, Any]:
        return Compute.of(value).to_json()

    @field_validator("max_memory")
    @classmethod
    def _bytes(cls, value: int | str | None) -> int | str | None:
        return value if value is None or memory("max_memory", value) else None

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_in_any_form(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple(f"{kind}={amount}" for kind, amount in value.items())
        if not isinstance(value, str | list | tuple):
            raise ValueError("KIND=VALUE is accepted, like sparsity=0.9")
        return (value,) if isinstance(value, str) else value

    @field_validator("repair", mode="before")
    @classmethod
    def _repair_in_any_form(cls, value: Any) -> Any:
        return (",".join(value) or "none") if isinstance(value, list | tuple) else value

    @field_validator("min_density", "max_density", mode="before")
    @classmethod
    def _bounds_in_any_form(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return value
        bounds = [text.rpartition("=") for text in ((value,) if isinstance(value, str) else value)]
        if not all(pattern and density for pattern, _, density in bounds):
            raise ValueError("LAYERS=DENSITY is accepted, like fc=0.2")
        return {pattern: density for pattern, _, density in bounds}

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("input", mode="before")
    @classmethod
    def _shape_in_words(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @classmethod
    def resolve(cls, path: Path | None, given: Mapping[str, Any], settings: Iterable[str]) -> RecipeFile:
        """The file's recipe, overridden by what was `given` (None: not given), then by `a.b=c` settings.

        Raises:
            UsageError: unreadable file, unknown key (with the nearest), or a value of the wrong type.
        """
        content: dict[str, Any] = _read(path) if path else {}
        content |= {key: value for key, value in given.items() if value is not None and value != ()}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise UsageError(f"--set {setting}: write KEY=VALUE, like options.variance.limit=5.")
            first, _, rest = key.partition(".")
            if first == "budget" and rest:
                content["budget"] = _by_kind(content.get("budget", ()))
            # layer names have dots of their own
            inner = [rest] if first in ("min_density", "max_density") else rest.split(".")
            _put(content, [first, *inner] if rest else [first], _parsed(value, f"--set {setting}"))
        for key in content:
            if key not in cls.model_fields:
                raise unknown("recipe key", str(key), cls.model_fields)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first_error = error.errors()[0]
            where = ".".join(str(part) for part in first_error["loc"])
            said = first_error["msg"].removeprefix("Value error, ").rstrip(".")
            raise UsageError(f"recipe: {where}={first_error['input']!r}: {said}.") from error

    def parsed_budget(self) -> Budget:
        """The budget.

        Raises:
            UsageError: the recipe has none.
        """
        if not self.budget:
            raise UsageError("no budget: give --budget, like --budget sparsity=0.9 or --budget macs=50%.")
        return Budget.parse(*self.budget)

    def rules(self) -> Rules:
        """The rules on layers."""
        return Rules(self.include, self.exclude, self.min_density, self.max_density, self.floor)


def gallery() -> dict[str, Path]:
    """Named recipes that come along: `--recipe NAME` takes one for a model of one's own."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


class _Yaml(yaml.SafeLoader):
    """YAML in which `2:4` is text (YAML 1.1 reads 124, as in minutes and seconds) and `1e-3` is a number."""


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
}
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Yaml.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def _read(path: Path) -> dict[str, Any]:
    known = gallery()
    if str(path) in known and not path.exists():
        path = known[str(path)]
    elif path.suffix == "" and not path.exists():
        raise unknown("recipe", str(path), known)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}.") from error
    content = _parsed(text, f"the recipe {path}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"the recipe {path} is no mapping of keys to values.")
    return content


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Yaml)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _by_kind(budget: Any) -> Any:
    """A budget in words as a mapping from kind to amount."""
    if isinstance(budget, Mapping):
        return dict(budget)
    texts = (budget,) if isinstance(budget, str) else budget
    parts = (part.partition("=") for text in texts for part in str(text).split(","))
    return {kind.strip(): amount.strip() for kind, _, amount in parts}


def _put(content: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = content.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {'.'.join(keys)}: {key} is not a mapping.")
        content = inner
    content[keys[-1]] = value
