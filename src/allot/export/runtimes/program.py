"""Programs of `torch.export`, .pt2. A program can run any code when it is opened."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allot.export.runtimes.opened import Form, Opened, capture, quiet
from allot.network.trees import as_arguments


def _write(model: nn.Module, example: Any, path: Path) -> None:
    args, kwargs = as_arguments(example)
    with quiet():
        program = _stripped(capture(model, args, kwargs))
        buffer = io.BytesIO()  # save looks at the ending of a path
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())


def _stripped(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without example inputs, which would be pickled, and without the file names of its source."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in node.meta.keys() - {"val", "nn_module_stack"}:
                del node.meta[key]
    return program


def _open(path: Path) -> Opened:
    content = path.read_bytes()
    with quiet():
        return Opened.module(torch.export.load(io.BytesIO(content)).module(), len(content))


PROGRAM = Form(".pt2", _write, _open, runs_code=True)
