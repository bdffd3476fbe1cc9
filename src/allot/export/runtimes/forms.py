"""The forms that a runtime reads, by name; a model written in one of them, opened again and compared with itself.

program   a `torch.export` program (.pt2)             opened by torch.export.load
onnx      ONNX (.onnx), any batch size                opened by ONNX Runtime; extra `onnx`
openvino  a directory with OpenVINO's model.xml       opened by OpenVINO on the CPU; extra `openvino`
hf        a directory of transformers                 opened by from_pretrained; extra `hf`
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.errors import AllotError, UsageError, first_line
from allot.export.runtimes.answers import allowed, check_answers
from allot.export.runtimes.onnx import ONNX
from allot.export.runtimes.opened import Form, Opened
from allot.export.runtimes.openvino import OPENVINO
from allot.export.runtimes.pretrained import PRETRAINED
from allot.export.runtimes.program import PROGRAM
from allot.network.channels import copied
from allot.network.trees import cloned
from allot.run.store import replacing

FORMS: dict[str, Form] = {"program": PROGRAM, "onnx": ONNX, "openvino": OPENVINO, "hf": PRETRAINED}


def write_and_reopen(model: nn.Module, example: Any, path: Path, to: str) -> tuple[Opened, list[Tensor]]:
    """(the written model, opened again, outputs of the model): `export` to an empty place, without a probe.

    Raises:
        UsageError: the model cannot be written in this form.
        VerificationError: the outputs differ.
    """
    form = FORMS[to]

    def ask(draw: int) -> list[Tensor]:
        # a new copy each time: a forward pass may write to its model, and must change neither model nor file
        return Opened.module(copied(model).eval()).ask(example, draw=draw)

    with torch.no_grad():
        try:
            wanted = ask(0)
            with replacing(path) if form.ending else nullcontext(path) as place:
                form.write(copied(model).eval(), cloned(example), place)
            opened = form.open(path)
            outputs = opened.ask(example)
        except (AllotError, OSError):
            raise
        except Exception as problem:
            first: BaseException = problem
            while first.__cause__ is not None:  # exporters wrap the cause in advice
                first = first.__cause__
            reason = first_line(first)
            raise UsageError(f"{type(model).__name__} cannot be written as {to} for such inputs: {reason}") from problem
        check_answers(f"{path.name} answers otherwise than the model", outputs, wanted, lambda: ask(1), allowed(wanted))
    return opened, wanted
