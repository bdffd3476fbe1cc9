"""`Result`: a sparse model that meets its budget, recounted on construction, certified on saving."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.budget.allocation import Allocation
from allot.errors import BudgetError, NotFinite, UsageError, VerificationError, first_line
from allot.export.certificate import certificate
from allot.export.certificate.records import record
from allot.export.certificate.rows import sealed
from allot.export.certificate.structure import structure_of
from allot.export.export import export_run, form_of
from allot.export.files import formats as files
from allot.export.files.writing import Later, Value
from allot.network.arguments import typed
from allot.network.call import write_into
from allot.network.channels import ChannelPlan, slimmed
from allot.network.copies import deep_copy
from allot.network.coupling.dead import without_dead_channels
from allot.network.layers import plain_state
from allot.network.preserved import preserved
from allot.report.card import card
from allot.report.data import figures, histograms, layer_rows, report
from allot.report.exports import Exported, add_export, exports_of
from allot.report.headline import headline
from allot.report.layers import Layers
from allot.report.page import write_run
from allot.run.driver import phase
from allot.run.places import check_directory_place
from allot.run.problem import Candidate, Problem
from allot.run.recipes import Recipe
from allot.run.store import Log, write_json

log = logging.getLogger("allot")


@dataclass(frozen=True)
class Result:
    """A sparse model that meets its budget: one that does not cannot be constructed.

    Attributes:
        problem: the request.
        candidate: allocation, masks, and the tensors that differ from the dense model.
        log: seconds per stage; samples pushed forward and backward through any network (scoring not counted).
        names: the parts of the chain by name.
        method: the recipe's name, or the allocator's.
        label: the name of the model in reports.
        scores: `{"metric", "dense", "sparse"}` on held-out data, or None.
        guarantees: `{kind, asked, limit, found, met, text}` of every guarantee on the quality, like max_drop.
        latency: milliseconds allowed, predicted and measured, where time was limited.
        directory: the run directory, if the run was saved.
        summary: a sentence about the allocator; empty for an allocator of the user.
    Raises:
        BudgetError: the recounted masks or weights break the budget or their allocation.

    >>> import allot
    >>> allot.prune(nn.Linear(4, 4), None, "sparsity=0.5", repair="none").allocation.kept
    {'weight': 8}
    """

    problem: Problem
    candidate: Candidate
    log: Log
    names: Recipe
    method: str
    label: str
    scores: Mapping[str, Any] | None = None
    latency: Mapping[str, Any] | None = None
    directory: Path | None = None
    summary: str = ""
    guarantees: tuple[Mapping[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"Result({self.label}, {self.method}: {self.headline})"

    def _repr_html_(self) -> str:
        return card(self._figures(), self.directory)

    def __post_init__(self) -> None:
        tensors, dense = self.candidate.one_at_a_time(self.problem), self.problem.dense
        nonzero = {
            layer.name: int(torch.count_nonzero(tensors.get(layer.name, dense[layer.name])))
            for layer in self.problem.scope
        }
        masks = self.candidate.masks
        masked = {layer.name: int(masks[layer.name].sum()) for layer in self.problem.scope if layer.name in masks}
        kept = self.candidate.allocation.kept
        sizes = self.problem.budget.sizes(kept)
        if masked != sizes or any(nonzero[name] > sizes[name] for name in sizes):
            wrong = [name for name in sizes if masked.get(name) != sizes[name] or nonzero[name] > sizes[name]]
            raise BudgetError(f"masks do not keep what the allocation says: {', '.join(wrong[:5])}.")
        if not self.problem.budget.meets(kept):
            cost = f"{sum(masked.values()):,} of {self.problem.budget.total:,} weights kept"
            raise BudgetError(f"the budget {self.problem.budget.to_json()} or a layer's bounds are broken: {cost}.")
        for name, value in self.candidate.tensors.items():
            if not bool(torch.isfinite(value).all()):
                raise NotFinite(f"{name} holds values that are not finite after repair.")

    @cached_property
    def histograms(self) -> dict[str, dict[str, list[float]]]:
        """Layer -> `{edges, dense, sparse}`, counted once: see `allot.report.data.histograms`."""
        return histograms(self.problem, self.candidate)

    @property
    def allocation(self) -> Allocation:
        """How much each layer keeps."""
        return self.candidate.allocation

    @property
    def headline(self) -> str:
        """What was removed and what that cost, in one sentence."""
        return headline(self._figures())

    @property
    def layers(self) -> Layers:
        """A row for every layer in scope, in the model's order: name, shape, kept, total, density, MACs."""
        return Layers.of(layer_rows(self.problem, self.allocation))

    @property
    def fidelity(self) -> dict[str, float | None] | None:
        """How close the outputs are to the dense model's, on inputs that nothing trained on.

        `{kl | error, agreement}`, see `allot.run.fidelity`; agreement only where outputs are classes. None where
        nothing was compared.
        """
        if not self.log.fidelity:
            return None
        last = self.log.fidelity[-1]
        return {key: last[key] for key in ("kl", "error", "agreement") if key in last}

    def plot(self, axes: Any = None) -> Any:
        """The density of every layer as a bar; returns the matplotlib axes (extra `plot`).

        Args:
            axes: to draw into; None: those of a new figure.
        Raises:
            UsageError: matplotlib is not installed.
        """
        return self.layers.plot(axes)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Layer name -> bool mask."""
        return self.candidate.masks

    def model(self) -> nn.Module:
        """A copy of the model that was passed in, with zeros folded in: plain classes, plain keys.

        Raises:
            UsageError: the model holds something that Python cannot copy.
        """
        try:
            model = deep_copy(self.problem.model)
        except Exception as error:
            raise UsageError(
                f"{self.label} cannot be copied ({error}): load result.state_dict() into a model of your own."
            ) from error
        write_into(model, self.candidate.one_at_a_time(self.problem))
        return model

    def plan(self) -> ChannelPlan | None:
        """The channels that stay, where channels were pruned: `slim` and a slim file are cut by this plan."""
        groups = self.problem.scope.groups
        return ChannelPlan.of(self.problem.model, groups, self.candidate.channels) if groups else None

    def slim(self) -> nn.Module:
        """A copy of the model that physically holds only the channels kept; its outputs are those of `model()`.

        Where single weights were pruned, channels that nothing depends on any more go; often there are none.

        Raises:
            UsageError: channels cannot be followed, or need calibration inputs for that.
        """
        plan = self.plan()
        if plan is None:
            with preserved(self.problem.model):  # hooks of a copy refer to what those of the model refer to
                return without_dead_channels(self.model(), self.problem.inputs().example())[0]
        return slimmed(self.model(), plan)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the sparse model's state dict: the model's own keys, zeros folded in."""
        tensors = self.candidate.effective(self.problem)  # tied names share one tensor
        aliases = plain_state(self.problem.model)[1]
        state = self.problem.model.state_dict()  # may hold more than tensors
        state = {name: tensors.get(aliases.get(name, name), value) for name, value in state.items()}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    @typed
    def export(self, path: str | os.PathLike[str] | None = None, *, to: str | None = None) -> Exported:
        """Write a file for a runtime, open it again, compare it with this result and time it beside the dense model.

        Args:
            path: the file (of slim, openvino and hf, a directory); None: in the run directory, whose report gets the
                row in any case.
            to: a form of `allot export`; None: by the ending of `path`.
        Returns:
            The file, to pass on as a path, with `bytes`, `macs` and `verified`; a dict of sizes, times and errors, see
            `allot.export.export.export_run`.
        Raises:
            UsageError: an unknown form, or one that this model or installation does not allow; no input to run it on.
            VerificationError: the written file computes other outputs.
        """
        path = None if path is None else Path(path)
        form = form_of(path) if to is None else to
        if form is None and path is None:
            raise UsageError("nothing says what to export to: give a path like model.onnx, or to='bitmask'.")
        if form is None:
            raise UsageError(
                f"{path}: its ending says no form (.onnx, .pt2 and .safetensors do): give to=, like to='openvino'."
            )
        example = self.problem.example
        if example is None:
            example = self.problem.inputs().example()
        if self.directory is None:
            if path is None:
                raise UsageError("no place to write to: give a path, or save the result first.")
            with tempfile.TemporaryDirectory() as folder:
                saved = replace(self)
                saved.save(folder)
                return Exported(export_run(self.problem.model, Path(folder), saved.report(), example, form, path))
        row = export_run(self.problem.model, self.directory, self.report(), example, form, path)
        add_export(self.directory, row)
        return Exported(row)

    def timed(self) -> dict[str, Any]:
        """The report of a saved result; without times or exports so far, its small file is opened again and compared.

        A slim file is timed beside the dense model; a bitmask file computes as dense. Where the model does not run, a
        warning says why.
        """
        report = self.report()
        if report["exports"] or report["latency"]:
            return report
        try:
            self.export(to="slim" if report["groups"] else "bitmask")
        except Exception as error:  # noqa: BLE001 - a model may raise whatever it likes; the run itself is done
            log.warning("%s is not timed: %s", self.label, first_line(error))
        return self.report()

    def _figures(self) -> dict[str, Any]:
        try:
            exports = exports_of(self.directory)
        except UsageError:  # a damaged file is no reason for a result not to be shown
            exports = []
        return {**figures(self), "exports": exports}

    def report(self) -> dict[str, Any]:
        """The content of the report, as data."""
        return {**report(self), "exports": exports_of(self.directory)}

    @typed
    def save(self, directory: str | os.PathLike[str]) -> dict[str, Any]:
        """Write model files, allocation.json, certificate.json, report.json and report.html; returns the certificate.

        Raises:
            VerificationError: the re-opened files do not hold what was promised.
        """
        directory = check_directory_place(directory)
        directory.mkdir(parents=True, exist_ok=True)
        budget, kept = self.problem.budget, self.allocation.kept
        metadata = files.metadata_of(self.problem.model, self.problem.scope, budget)
        state = self._state_to_write()
        values = self.problem.model.state_dict()
        if others := [name for name in values if name not in state and name not in metadata["aliases"]]:
            log.warning(
                "not saved, because no %s: %s: copy it from the model, or load the files with strict=False",
                "dense tensor" if any(isinstance(values[name], Tensor) for name in others) else "tensor",
                ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else ""),
            )
        with phase(f"writing {files.PLAIN}", self.log.finish):
            files.save_tensors(directory / files.PLAIN, state, "plain", metadata)
        plan, smaller = self.plan(), files.SLIM if self.problem.scope.groups else files.BITMASK
        with phase(f"writing {smaller}", self.log.finish):
            if plan:
                write_json(directory / files.PLAN, plan.to_json())
                files.save_slim(directory / files.SLIM, state, metadata, plan, self.problem.scope.groups)
            else:
                files.save_bitmask(directory / files.BITMASK, state, metadata)
        with phase("re-opening and recounting", self.log.finish):
            write_json(directory / "allocation.json", {**self.allocation.to_json(), "budget": budget.to_json()})
            structure = structure_of(self.problem.pattern, self.problem.scope)
            certified = certificate.certify(directory, budget.sizes(kept), kept, structure)
            write_json(directory / "certificate.json", certified)
        object.__setattr__(self, "directory", directory)
        with phase("writing the report", self.log.finish):
            content = report(self)
            write_json(directory / "report.json", sealed(content))
            if not certified["passed"]:
                failed = next(row for row in certified["rows"] if not row["passed"])
                raise VerificationError(
                    f"{failed['file']}: {failed['check']}: promised {failed['promised']}, found {failed['found']}."
                )
            write_run(directory, content)
            record(directory)
        return certified

    def _state_to_write(self) -> dict[str, Value]:
        """The plain state dict; a tensor that differs from the model's is made when it is written."""
        tensors = self.candidate.one_at_a_time(self.problem)
        state: dict[str, Value] = dict(plain_state(self.problem.model)[0])
        for name in tensors.keys() & state.keys():
            like = self.candidate.tensor(self.problem, name)
            state[name] = Later(like.dtype, tuple(like.shape), partial(tensors.__getitem__, name))
        return state

    def verify(self) -> dict[str, Any]:
        """Re-open and recount the saved files: `{passed, rows}`.

        Raises:
            UsageError: the result was not saved.
        """
        if self.directory is None:
            raise UsageError("nothing to verify: save the result first, or prune with save_to=.")
        return certificate.verify(self.directory)
