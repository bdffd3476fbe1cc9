"""What was promised, what the re-opened files hold, and whether that is the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allot.channels import ChannelPlan
from allot.errors import UsageError
from allot.realise.files import BITMASK, PLAIN, PLAN, SLIM, TABLES, read, stored, untouched
from allot.realise.forms import PROBE
from allot.realise.held import load_tables
from allot.realise.probe import ANSWERS, holds_tensors, probe_of, probe_rows
from allot.realise.rows import Row, checked, digest
from allot.store import read_run


def certify(directory: Path, kept: Mapping[str, int], allocated: Mapping[str, int]) -> dict[str, Any]:
    """The certificate of a run whose files are written: `{promised, rows, passed, sha256}`, the last of the others.

    Args:
        directory: the run directory; holds model.safetensors and a smaller file.
        kept: layer name -> weights that the allocation keeps.
        allocated: what the allocation keeps, in weights of layers or in channels of groups.
    """
    files = {
        name: digest(directory / name) for name in (PLAIN, BITMASK, SLIM, PLAN, TABLES) if (directory / name).exists()
    }
    promised = {"kept": dict(kept), "allocated": dict(allocated), "files": files}
    rows = _rows(directory, promised)
    return sealed({"promised": promised, "rows": rows, "passed": all(row["passed"] for row in rows)})


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a certificate with the SHA-256 of its own text."""
    own = {key: content[key] for key in ("promised", "rows", "passed")}
    return {**own, "sha256": hashlib.sha256(json.dumps(own, indent=2).encode()).hexdigest()}


def verify(path: str | Path, model: nn.Module | None = None) -> dict[str, Any]:
    """Re-open and recount a run or an exported file: `{passed, rows: [{file, check, promised, found, passed}]}`.

    A run is held to its certificate, its exports to their digests; a single file of tensors to its seal and the limits
    in its own metadata; what a runtime reads, and answers, to the probe beside it. Nothing is unpickled. Seals and
    digests find accidents, not people who make new ones.

    Args:
        model: the dense model, or another with its code: exported files that hold nothing but tensors are put into it
            and have to answer their probes as well.
    Raises:
        UsageError: neither a finished run nor a file that allot wrote; or a model, and no probe for it.
    """
    path = Path(path)
    try:
        there = path.exists()
    except OSError:  # a name that is too long is no name
        there = False
    if not there:
        raise UsageError(f"{path}: no such file or directory.")
    if path.name.endswith("probe.safetensors"):
        raise UsageError(f"{path} is the probe of an export: verify the file or directory that it lies beside.")
    rows = probe_rows(path, model=model) if probe_of(path).exists() else []
    if path.is_dir() and not rows:
        rows = _run_rows(path, model)
    elif path.is_file() and (not rows or holds_tensors(path)):
        rows = _alone_rows(path) + rows
    if model is not None and not any(row["check"] == ANSWERS for row in rows) and all(row["passed"] for row in rows):
        raise UsageError(f"{path} has no probe to ask a model: allot export RUN --to safetensors writes one.")
    return {"passed": all(row["passed"] for row in rows), "rows": rows}


def _alone_rows(path: Path) -> list[Row]:
    """Of a file of tensors.

    Raises:
        UsageError: it is of another kind, or part of something else.
    """
    if probe_of(path.parent).exists():
        raise UsageError(f"{path} is part of an export: verify {path.parent}.")
    if path.suffix in (".onnx", ".pt2"):
        raise UsageError(f"no {probe_of(path).name} beside {path}: copy it there, or export again.")
    rows = _file_rows(path, None)[0]
    if rows[0]["check"] != "opens" and "seal" in stored(path)[1]:  # earlier files carry no seal
        rows.insert(0, checked(path.name, "untouched", "yes", "yes" if untouched(path) else "no"))
    return rows


def _run_rows(path: Path, model: nn.Module | None) -> list[Row]:
    """Of a run directory.

    Raises:
        UsageError: it is none, or not finished.
    """
    # a result saved by hand has a certificate, but no run behind it
    by_hand = (path / "certificate.json").exists() and not (path / "run.json").exists()
    if not by_hand and read_run(path)["state"] != "done":
        raise UsageError(f"{path} is not finished: run the same prune command again to go on.")
    try:
        text = (path / "certificate.json").read_text()
        content = json.loads(text)
        same = text == json.dumps(sealed(content), indent=2) + "\n"
        rows = [checked("certificate.json", "untouched", "yes", "yes" if same else "no")]
        rows += _rows(path, content["promised"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        rows = [checked("certificate.json", "opens", "a certificate", problem, passed=False)]
    for probe in sorted((*path.glob("*.probe.safetensors"), *path.glob(f"*/{PROBE}"))):
        alone = probe.with_name(probe.name.removesuffix(".probe.safetensors"))
        rows += probe_rows(probe.parent if probe.name == PROBE else alone, ask=False, model=model)
    return rows


def _rows(directory: Path, promised: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    states: dict[str, dict[str, Tensor]] = {}
    for name, expected in promised["files"].items():
        path = directory / name
        if not path.exists():
            rows.append(checked(name, "exists", "yes", "no", passed=False))
            continue
        found = digest(path)
        rows.append(checked(name, "bytes on disk", expected["bytes"], found["bytes"]))
        rows.append(checked(name, "sha256", expected["sha256"], found["sha256"]))
        if name not in (PLAN, TABLES):
            more, states[name], aliases = _file_rows(path, promised["kept"])
            rows += more
    if all(row["passed"] for row in rows):
        other = SLIM if SLIM in states else BITMASK
        plain = states[PLAIN]
        if other == SLIM:
            plan = ChannelPlan.from_json(json.loads((directory / PLAN).read_text()))
            plain = {name: plan.cut(aliases.get(name, name), value) for name, value in plain.items()}
        rows.append(checked(other, f"same tensors as {PLAIN}", "yes", "yes" if _equal(plain, states[other]) else "no"))
        allocation = json.loads((directory / "allocation.json").read_text())["layers"]
        listed = {name: layer["kept"] for name, layer in allocation.items()}
        promise = promised.get("allocated", promised["kept"])
        check = "kept per group" if other == SLIM else "kept per layer"
        rows.append(checked("allocation.json", check, "as promised", _differing(promise, listed)))
    return rows


def _file_rows(path: Path, kept: Mapping[str, int] | None) -> tuple[list[Row], dict[str, Tensor], dict[str, str]]:
    """Rows of one file: it opens, no layer holds more than it may, every limit holds; its state dict; tied names."""
    try:
        state, about = read(path)
    except UsageError as error:
        return [checked(path.name, "opens", "a whole file", str(error), passed=False)], {}, {}
    if not about:
        raise UsageError(f"{path} was not written by allot: it carries no budget.")
    try:
        return _limit_rows(path, state, about, kept), state, about.get("aliases", {})
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        problem = f"cannot be understood ({type(error).__name__}: {error})"
        return [checked(path.name, "metadata", "layers and limits", problem, passed=False)], state, {}


def _limit_rows(
    path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any], kept: Mapping[str, int] | None
) -> list[Row]:
    missing = [name for name in about["layers"] if name not in state]
    rows = [checked(path.name, "layers present", "all", ", ".join(missing) or "all")]
    if missing:
        return rows
    found = {name: int(torch.count_nonzero(state[name])) for name in about["layers"]}
    broken = [name for name in found if not bool(torch.isfinite(state[name]).all())]
    rows.append(checked(path.name, "weights finite", "all", ", ".join(broken) or "all"))
    if kept is not None:
        over = [f"{name} {found[name]:,} > {kept.get(name, 0):,}" for name in found if found[name] > kept.get(name, 0)]
        rows.append(checked(path.name, "nonzeros per layer", "at most kept", ", ".join(over) or "at most kept"))
    total = sum(math.prod(shape) for shape, _ in about["layers"].values())
    costs: dict[str, float] = {"params": sum(found.values()), "sparsity": sum(found.values())}
    if all(macs is not None for _, macs in about["layers"].values()):
        exact = (Fraction(found[name] * macs, math.prod(shape)) for name, (shape, macs) in about["layers"].items())
        costs["macs"] = math.ceil(sum(exact))
    small = path if about["format"] != "plain" else path.with_name(SLIM if about.get("channels") else BITMASK)
    if small.exists():
        costs["bytes"] = small.stat().st_size
    if about["format"] == "slim" and (tables := path.with_name(TABLES)).exists():
        sides = {name: (float(state[name].shape[0]), float(state[name].shape[1])) for name in about["layers"]}
        costs["latency"] = math.ceil(load_tables(tables).of(sides)[0])
    for kind, limit in about["limits"].items():
        if kind == "latency" and kind not in costs:
            continue  # a file alone does not know how fast a machine is
        label = f"{kind}={about['asked'][kind]}" + (", ns by the tables" if kind == "latency" else "")
        if kind not in costs:
            rows.append(
                checked(path.name, label, f"at most {limit:,} bytes", f"{small.name} is not there", passed=False)
            )
        elif kind == "sparsity":
            promise, holds = f"at least {1 - limit / total:.6f}", f"{1 - costs[kind] / total:.6f}"
            rows.append(checked(path.name, label, promise, holds, passed=costs[kind] <= limit))
        else:
            rows.append(
                checked(path.name, label, f"at most {limit:,}", f"{costs[kind]:,}", passed=costs[kind] <= limit)
            )
    return rows


def _equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _differing(promised: Mapping[str, int], found: Mapping[str, int]) -> str:
    names = [name for name in promised.keys() | found.keys() if promised.get(name) != found.get(name)]
    return ", ".join(sorted(names)) or "as promised"
