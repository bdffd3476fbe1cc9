"""What one run worked out and the next run on the same model and data need not work out again.

A sweep hands one `Known` from cell to cell. Kept is only what depends on the dense model, the calibration batches and
the key: the dense net's answers, sensitivities, orders of weights. What was drawn for is not kept, since draws belong
to a step of one run; so a cell ends with the same bits whichever cells ran before it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from allot.run.evaluate import Score

T = TypeVar("T")


class Known:
    """Values by key, of one model and its data; none of them is to be changed in place.

    Args:
        dense: what the dense model scores on the test data.
    """

    def __init__(self, dense: Score | None = None) -> None:
        self.dense = dense
        self._values: dict[bool, dict[Hashable, Any]] = {True: {}, False: {}}  # whether a seed decided them

    def forget_seed(self) -> None:
        """Keep only what no seed decides: a sweep is done with the last one."""
        self._values[True].clear()

    def get(self, key: Hashable, *, seeded: bool = True) -> Any:
        """The value, or None."""
        return self._values[seeded].get(key) if _hashable(key) else None

    def put(self, key: Hashable, value: Any, *, seeded: bool = True) -> None:
        """Keep it; keys that cannot be told apart, like those with a list in them, are not kept."""
        if _hashable(key):
            self._values[seeded][key] = value

    def once(self, key: Hashable, make: Callable[[], T], *, seeded: bool = True) -> T:
        """What `make` gives, made once."""
        if (value := self.get(key, seeded=seeded)) is not None:
            return value
        before = draws()
        made = make()
        if draws() == before:
            self.put(key, made, seeded=seeded)
        return made


def draws() -> list[bytes]:
    """Where torch's generators are: they move on when something is drawn."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [state.numpy().tobytes() for state in states]


def _hashable(key: Hashable) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
