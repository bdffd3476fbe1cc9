"""How a model is pushed through: choices about memory and speed that leave what is computed as it is."""

from __future__ import annotations

from dataclasses import dataclass

from allot.errors import check_number


@dataclass(frozen=True)
class Compute:
    """Choices about memory and speed.

    Args:
        micro_batch: most samples at a time whose activations are kept for gradients; 0: the whole batch. Gradients
            add up to those of the whole batch; of nets with batch norm see `allot.norms`.
    Raises:
        UsageError: a value out of its range.
    """

    micro_batch: int = 0

    def __post_init__(self) -> None:
        check_number("micro_batch", self.micro_batch, 0, whole=True)

    def pieces(self, samples: int) -> list[tuple[int, int]]:
        """(first, last + 1) of each micro-batch of so many samples; their sizes differ by one at most."""
        count = -(-samples // self.micro_batch) if self.micro_batch else 1
        return [(samples * i // count, samples * (i + 1) // count) for i in range(count)]
