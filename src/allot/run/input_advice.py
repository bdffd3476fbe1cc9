"""What to write instead, where the inputs of a sample are not those that the model takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Number
from typing import Any

from torch import nn

from allot.errors import UsageError


def with_advice(error: UsageError, model: nn.Module, inputs: Any) -> UsageError:
    """The error with a sentence about the structure of `inputs`, where that does not fit the model's `forward`."""
    advice = input_advice(model, inputs)
    return type(error)(f"{str(error).rstrip('.')}. {advice}") if advice else error


def input_advice(model: nn.Module, inputs: Any) -> str:
    """How to write samples for this model, where `inputs` of one do not fit the parameters of `forward`; else "".

    >>> class Two(nn.Module):
    ...     def forward(self, image, time): ...
    >>> input_advice(Two(), 1.0).partition(":")[0]
    'The model takes 2 inputs (image, time) and got 1'
    """
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = {parameter.kind for parameter in parameters}
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY, p.KEYWORD_ONLY)]
    needed = [p.name for p in named if p.default is p.empty]
    if isinstance(inputs, Mapping):
        names = [str(key) for key in inputs]
        return _of_dict(inputs, names if inspect.Parameter.VAR_KEYWORD in kinds else [p.name for p in named], needed)
    if isinstance(inputs, tuple) and len(inputs) > len(named) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        return (
            f"The model takes {len(named)} ({', '.join(p.name for p in named)}) and got {len(inputs)}, since a tuple "
            "is one input for each of its items. A collate_fn that makes a tuple of the samples has to stack them: "
            "torch.stack(items); a sample of one input is (input, label)."
        )
    given = len(inputs) if isinstance(inputs, tuple) else 1
    if given < len(needed):
        values = ", ".join(f"{name!r}: ..." for name in needed)
        return (
            f"The model takes {len(needed)} inputs ({', '.join(needed)}) and got {given}: what follows the first item "
            f"of a sample is read as labels. Write samples as (({', '.join(needed)}), label), the inputs as a tuple in "
            f"the first place, or as a dict {{{values}}}."
        )
    return ""


def _of_dict(inputs: Mapping[Any, Any], accepted: list[str], needed: list[str]) -> str:
    taken = [str(key) for key in inputs if str(key) in accepted]
    if extra := [str(key) for key in inputs if str(key) not in accepted]:
        keep = ", ".join(repr(key) for key in taken or needed)
        return (
            f"The model does not take {', '.join(extra)}: leave it out of the samples, like "
            f"{{key: sample[key] for key in ({keep},)}}."
        )
    if missing := [name for name in needed if name not in inputs]:
        return f"The model needs {', '.join(missing)} too: add it to the dict of every sample."
    for key in taken:
        value = inputs[key]
        if isinstance(value, list | tuple) and value and isinstance(value[0], Number | list | tuple):
            return (
                f"{key} is a list in every sample, which collating turns on its side: give tensors, like "
                f"{{{key!r}: torch.tensor(sample[{key!r}])}}, or dataset.with_format('torch') of the datasets library."
            )
    return ""
