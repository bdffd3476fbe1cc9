"""A written model, opened again, and what the runtimes that write and open models share."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from allot.errors import UsageError, first_line
from allot.export.files.formats import PROBE
from allot.network.draws import seeded
from allot.network.trees import as_arguments, cloned, tensors_in

log = logging.getLogger("allot")
Run = Callable[[Any], list[Tensor]]


@dataclass(frozen=True)
class Opened:
    """A written model, opened again.

    Attributes:
        run: inputs -> outputs, in order.
        bytes: size on disk.
        weights: every floating-point tensor of two dimensions or more that it holds.
        macs: inputs -> multiply-accumulates of its convolutions and matrix products on them.
    """

    run: Run
    bytes: int
    weights: Callable[[], Iterator[Tensor]]
    macs: Callable[[Any], int]

    def ask(self, example: Any, *, draw: int = 0) -> list[Tensor]:
        """Its outputs, the inputs unchanged; `draw` numbers the random draws of PyTorch."""
        with seeded(draw, {tensor.device for tensor in tensors_in(example)}):
            return self.run(cloned(example))

    @classmethod
    def module(cls, model: Callable[..., Any], size: int = 0) -> Opened:
        """A model that PyTorch runs."""

        def run(example: Any) -> list[Tensor]:
            with torch.no_grad():
                return list(tensors_in(apply(model, example)))

        def weights() -> Iterator[Tensor]:
            assert isinstance(model, nn.Module)
            tensors = {id(tensor): tensor.detach() for tensor in (*model.parameters(), *model.buffers())}
            return (tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.dim() > 1)

        def counted(example: Any, mode: AbstractContextManager[Any]) -> int:
            with mode, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                apply(model, cloned(example))
            return counter.get_total_flops() // 2

        def macs(example: Any) -> int:
            # fused operations are not counted: there are fewer with gradients, and in plain attention
            try:  # nothing goes backward: what would be saved for that is let go at once
                with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
                    return counted(example, torch.enable_grad())
            except Exception:  # noqa: BLE001 - a model that goes backward in its forward pass
                with contextlib.suppress(Exception):
                    return counted(example, torch.enable_grad())
            return counted(example, torch.no_grad())  # a model that runs without gradients only

        return cls(run, size, weights, macs)


@dataclass(frozen=True)
class Form:
    """How a form is written and opened.

    Attributes:
        ending: of its file; "" of a form that is a directory.
        runs_code: whether a file of this form can run any code when it is opened.
    """

    ending: str
    write: Callable[[nn.Module, Any, Path], None]
    open: Callable[[Path], Opened]
    runs_code: bool = False


def apply(model: Callable[..., Any], example: Any) -> Any:
    """The model's output on a batch of inputs."""
    args, kwargs = as_arguments(example)
    return model(*args, **kwargs)


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files in a directory but the probe of an export, in order."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    return sorted(file for file in path.rglob("*") if file.is_file() and file != path / PROBE)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory but the probe."""
    return sum(file.stat().st_size for file in files_of(path))


def by_name(example: Any, names: list[str]) -> dict[str, Tensor]:
    """The inputs by their names in the file: keyword arguments by name, positional ones in order.

    Raises:
        UsageError: the file takes other inputs.
    """
    args, kwargs = as_arguments(example)
    keywords = {name: t.detach().cpu() for name, t in kwargs.items() if isinstance(t, Tensor)}
    positional = [t.detach().cpu() for t in args if isinstance(t, Tensor)]
    inputs = keywords if keywords else dict(zip(names, positional, strict=False))
    if inputs.keys() != set(names) or (positional and len(positional) != len(names)):
        raise UsageError(f"the file takes {', '.join(names)}: {len(positional) or ', '.join(keywords)} given.")
    return inputs


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """The model as a program, for any batch size if the model allows that.

    Raises:
        UsageError: torch.export cannot capture the model.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    batches = iter([t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() and len(t) < 2 else t for t in tensors])
    originals = args, dict(kwargs)
    args = tuple(next(batches) if isinstance(value, Tensor) else value for value in args)
    kwargs = {name: next(batches) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    batch = torch.export.Dim("batch", min=1)
    open_batch = [{0: batch} if isinstance(v, Tensor) else None for v in args]
    shapes = (tuple(open_batch), {n: {0: batch} if isinstance(v, Tensor) else None for n, v in kwargs.items()})
    try:
        return torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes[0] if not kwargs else shapes[1])
    except Exception as first:  # noqa: BLE001 - torch.export raises anything where it takes no open batch
        try:
            program = torch.export.export(model, *originals)
            log.warning("%s is exported for inputs of these very shapes: it takes no open batch.", type(model).__name__)
            return program
        except Exception:  # noqa: BLE001 - torch.export raises anything
            reason = first_line(first)
            raise UsageError(f"{type(model).__name__} cannot be captured by torch.export: {reason}") from first


def need(extra: str, *modules: str) -> None:
    """Raises:
    UsageError: a module of this extra is not installed.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{', '.join(missing)} is not installed: pip install 'allot[{extra}]'.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open, exporters neither print, log nor warn."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
