"""A recipe file: what `allot prune` says on the command line, as YAML that is checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from allot.budget import Budget
from allot.errors import UsageError, unknown
from allot.layers import Rules


class RecipeFile(BaseModel):
    """Everything that decides a run. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    weights: str | None = None
    data: str | None = None
    test: str | None = None
    input: tuple[int, ...] | None = None
    budget: tuple[str, ...] = ()
    method: str = "erk"
    allocate: str | None = None
    score: str | None = None
    pattern: str | None = None
    repair: str | None = None
    options: dict[str, dict[str, Any]] = {}
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_density: dict[str, float] = {}
    max_density: dict[str, float] = {}
    floor: int | str = 1
    seed: int = 0
    samples: int = 512
    batch_size: int = 64

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_in_any_form(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple(f"{kind}={amount}" for kind, amount in value.items())
        return (value,) if isinstance(value, str) else value

    @field_validator("repair", mode="before")
    @classmethod
    def _repair_in_any_form(cls, value: Any) -> Any:
        return (",".join(value) or "none") if isinstance(value, list | tuple) else value

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
        content: dict[str, Any] = {}
        if path:
            try:
                content = yaml.safe_load(path.read_text()) or {}
            except (OSError, yaml.YAMLError) as error:
                raise UsageError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from error
            if not isinstance(content, dict):
                raise UsageError(f"the recipe {path} is no mapping of keys to values.")
        content |= {key: value for key, value in given.items() if value is not None and value != ()}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise UsageError(f"--set {setting}: write KEY=VALUE, like options.variance.limit=5.")
            _put(content, key.split("."), yaml.safe_load(value))
        for key in content:
            if key not in cls.model_fields:
                raise unknown("recipe key", key, cls.model_fields)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(f"recipe: {where}={first['input']!r}: {first['msg']}.") from error

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


def _put(content: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = content.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {'.'.join(keys)}: {key} is not a mapping.")
        content = inner
    content[keys[-1]] = value
