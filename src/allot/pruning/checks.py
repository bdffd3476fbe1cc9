"""What a model has to be to be pruned, and the words for what it is not."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.network.layers import Rules, Scope
from allot.network.shared_memory import check_shared_memory


def check_plain(model: nn.Module) -> None:
    """Raises:
    UsageError: the model is compiled, or wrapped in something, or parameters share memory.
    """
    wrappers = torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise UsageError(
            f"a compiled or wrapped model ({type(model).__name__}): pass the module that it was made from."
        )
    check_shared_memory(model)


def check_numbers(model: nn.Module) -> None:
    """Raises:
    UsageError: a parameter that is not finite, or a buffer with nan.
    """
    for name, parameter in model.named_parameters():
        if not _all_finite(parameter.detach()):
            raise UsageError(f"{name} holds nan or infinite values: the model cannot be pruned as it is.")
    for name, buffer in model.named_buffers():
        if not _all_finite(buffer, infinite=True):  # infinite is what attention masks hold
            raise UsageError(f"{name} holds nan: the model cannot be pruned as it is.")


def _all_finite(values: Tensor, *, infinite: bool = False) -> bool:
    if not values.is_floating_point() or values.is_meta or values.layout is not torch.strided:
        return True
    if values.element_size() == 1:  # 8 bits, and pairs of 4, have no arithmetic
        with suppress(RuntimeError, NotImplementedError):
            return _all_finite(values.float(), infinite=infinite)
        return True
    return not bool(torch.isnan(values).any()) if infinite else bool(torch.isfinite(values).all())


def check_followed(model: nn.Module) -> None:
    """Raises:
    UsageError: a scripted part, through which channels cannot be followed.
    """
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise UsageError(
            f"{scripted[0]} is a scripted module (torch.jit): channels cannot be followed through it. Put the module "
            "that it was made from in its place, or prune single weights (--pattern unstructured)."
        )


def packed_weights(model: nn.Module) -> dict[str, str]:
    """Weights of quantised modules of torch, which are no parameters: name -> the reason why they stay dense."""
    return {
        f"{name}.weight" if name else "weight": f"quantised ({type(module).__name__}): packed, and no parameter"
        for name, module in model.named_modules()
        if ".quantized" in type(module).__module__ and callable(getattr(module, "weight", None))
    }


def nothing_in_scope(scope: Scope, rules: Rules | None) -> str:
    """The error for a model without a weight to prune: the reasons, those of biases and norms last."""
    later = {name: reason == "bias" or reason.startswith("normalisation") for name, reason in scope.skipped.items()}
    names = sorted(scope.skipped, key=later.__getitem__)
    shown = "; ".join(f"{name}: {scope.skipped[name]}" for name in names[:4])
    reasons = shown + (f"; and {len(names) - 4} more" if len(names) > 4 else "") or "it has no parameters"
    wider = " Widen the include rules." if rules and rules.patterns else ""
    return f"nothing in scope: no weight can be pruned ({reasons}).{wider}"
