"""Linear layers multiplied as sparse matrices, each only if that was measured to be faster than the dense layer.

csr   compressed sparse rows, on the CPU
2:4   semi-structured, in half precision, on a GPU with sparse tensor cores

The layers stay `nn.Linear`: their weight is a sparse tensor, which `torch.nn.functional.linear` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.export.files.formats import csr, stored, unpacked
from allot.network.arguments import typed
from allot.network.channels import copied

Convert = Callable[[Tensor], Tensor]


def semi_structured(weight: Tensor) -> Tensor:
    """The matrix in the format of sparse tensor cores: two of four, half precision, on a GPU."""
    return torch.sparse.to_sparse_semi_structured(weight.detach())


def has_sparse_tensor_cores() -> bool:
    """Whether this machine's GPU multiplies 2:4 matrices in hardware: compute capability 8.0 and above."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def linear_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """Weight name -> layer, of the linear layers among `names`.

    Raises:
        UsageError: there is no such layer.
    """
    wanted = set(names)
    layers = {
        f"{name}.weight".lstrip("."): module for name, module in model.named_modules() if type(module) is nn.Linear
    }
    if not (pruned := {name: module for name, module in layers.items() if name in wanted}):
        raise UsageError("no linear layer was pruned: nothing else is multiplied as a sparse matrix.")
    return pruned


def converted(model: nn.Module, names: Iterable[str], convert: Convert) -> nn.Module:
    """A copy of the model with the weights of these linear layers converted."""
    model = copied(model)
    for layer in linear_layers(model, names).values() if (names := list(names)) else ():
        layer.weight = nn.Parameter(convert(layer.weight), requires_grad=False)
    return model


@typed
def load_csr(model: nn.Module, path: str | Path) -> nn.Module:
    """`model` with the weights of a csr file, sparse if they are sparse in the file; in eval mode, the model unchanged.

    Raises:
        UsageError: no csr file, or a csr file of another model.

    >>> load_csr(nn.Linear(2, 1), "no/such.safetensors")
    Traceback (most recent call last):
    allot.errors.UsageError: no/such.safetensors: no such file.
    """
    path = Path(path)
    tensors, metadata = stored(path)
    if metadata.get("format") != "csr":
        raise UsageError(f"{path} is no csr file: allot export RUN --to csr writes one.")
    model = with_tensors(model, path, unpacked(path, tensors, metadata))
    return converted(model, [name.removesuffix(".crow") for name in tensors if name.endswith(".crow")], csr)


def with_tensors(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model in eval mode with the tensors of the file at `path`, each asked for once, when it is copied.

    Raises:
        UsageError: the tensors belong to another model.
    """
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    wrong = sorted(tensors.keys() ^ state.keys())
    if not wrong:
        copy = copied(model).eval()
        places = dict(copy.named_parameters()) | dict(copy.named_buffers())  # a tied tensor under one name
        for name in state:
            value = state[name]
            if value.shape != tensors[name].shape:
                wrong.append(name)
            elif name in places:
                places[name].data.copy_(value)
    if wrong:
        raise UsageError(f"{path} belongs to another model: {', '.join(sorted(wrong)[:5])} differ.")
    return copy
