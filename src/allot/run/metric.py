"""Scores of one's own: a function of the user, and what its numbers mean.

A function has one of two forms, by the name of its first parameter:

    f(outputs, targets) -> {name: number}   of a batch; averaged over batches, each weighs by its number of samples
    f(model, data) -> {name: number}        of all the data; the first parameter is called `model`

A plain number stands for {name of the function: number}. The first name is the headline score.

Larger is better, except for names that hold one of the words in `LOWER` (val_loss, MSE, error_rate). An attribute of
the function says otherwise: `f.lower_is_better = True`, False, or the names for which it holds.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from allot.errors import UsageError, first_line
from allot.run.named import function_at

LOWER = frozenset(
    {"cer", "distance", "error", "errors", "kl", "loss", "mae", "mape", "mse", "nll", "perplexity", "rmse", "wer"}
)


@dataclass(frozen=True)
class Metric:
    """A function of the user that scores; `whole` is whether it takes `(model, data)`.

    >>> metric = Metric.of(lambda outputs, targets: {"dice": 0.8, "val_loss": outputs - targets})
    >>> metric(3, 2), metric.whole, metric.lower(["dice", "val_loss"])
    ({'dice': 0.8, 'val_loss': 1.0}, False, ('val_loss',))
    """

    function: Callable[..., Any]
    name: str
    whole: bool

    @classmethod
    def of(cls, metric: Callable[..., Any] | str) -> Metric:
        """The metric that a user wrote: a function, or the place of one.

        Args:
            metric: a function of two arguments, or "file.py:function" or "package.module:function".
        Raises:
            UsageError: no such function, or one that does not take two arguments.
        """
        function: Any = metric
        if isinstance(metric, str):
            try:
                function = function_at(metric)
            except UsageError as error:
                raise UsageError(f"metric {metric!r}: {error}") from error
        name = getattr(function, "__name__", None) or type(function).__name__
        if not callable(function):
            raise UsageError(f"metric={metric!r}: a function, file.py:function or package.module:function is accepted.")
        return cls(function, name, _takes_the_whole(function, name))

    def __call__(self, *arguments: Any) -> dict[str, float]:
        """The numbers that the function returns, by name.

        Raises:
            UsageError: the function fails, or returns something else.
        """
        try:
            returned = self.function(*arguments)
        except Exception as error:
            raise UsageError(f"the metric {self.name} fails{self._place(error)}: {_told(error)}") from error
        values = dict(returned) if isinstance(returned, Mapping) else {self.name: returned}
        if not values or not all(isinstance(name, str) for name in values):
            raise UsageError(f"the metric {self.name} returns {returned!r}: a number or {{name: number}} is accepted.")
        return {name: self._number(name, value) for name, value in values.items()}

    def lower(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names of numbers for which lower is better."""
        says = getattr(self.function, "lower_is_better", None)
        if isinstance(says, bool):
            return tuple(names) if says else ()
        if says is None:
            return tuple(name for name in names if LOWER & {word.lower() for word in _WORD.findall(name)})
        named: Collection[str] = (says,) if isinstance(says, str) else says
        return tuple(name for name in names if name in named)

    def _number(self, name: str, value: Any) -> float:
        try:
            if isinstance(value, str):
                raise TypeError
            return float(value.detach() if hasattr(value, "detach") else value)
        except (TypeError, ValueError, RuntimeError):
            shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
            raise UsageError(
                f"the metric {self.name} returns a {type(value).__name__}{shape} as {name!r}: one number is accepted, "
                "like the mean of a tensor."
            ) from None

    def _place(self, error: Exception) -> str:
        """Where in the user's file the function failed."""
        code = getattr(self.function, "__code__", None)
        frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
        return f" in line {frames[-1].lineno}" if frames else ""


# words of a name in snake_case, CamelCase or with an abbreviation, like mse, val_loss and MSELoss
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def _takes_the_whole(function: Callable[..., Any], name: str) -> bool:
    """Whether the function takes (model, data).

    Raises:
        UsageError: it does not take two arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function written in C
        return False
    try:
        signature.bind(None, None)
    except TypeError:
        raise UsageError(
            f"the metric {name}{signature} does not take two arguments: (outputs, targets) for every batch, or "
            "(model, data) for all the data at once, is accepted."
        ) from None
    parameters = list(signature.parameters)
    if parameters[0] != "model" and {"model", "data"} & {*parameters[1:2]}:
        raise UsageError(
            f"the metric {name}{signature} may mean a batch or all the data: (outputs, targets) or (model, data) is "
            "accepted, with these names."
        )
    return parameters[0] == "model"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
