"""Signs that a model was never trained: in its weights, in its outputs, and in its score on labelled data.

weights   most layers hold a uniform draw, w ~ U(-b, b) with one of the bounds b of `torch.nn.init`: no |w| is above b,
          the largest one is as close to b as a draw comes, and mean(w^2) = b^2 / 3; a single step of training moves
          weights above b. Or every normalisation that can move is as it was made, its bias or statistics too, and the
          weights have no heavier tails than a draw.
outputs   of classes: mean entropy >= 99 % of log(classes); of any: inputs move them by less than .003 % of their size.
score     kappa = (p - p_c) / (1 - p_c) is near 0, with p top-1 and p_c what it would be if answers and labels were
          independent: the sum over classes of the share of answers times the share of labels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from allot.network.kinds import kind_of
from allot.run.outputs import classes, wide
from allot.run.store import Log

logger = logging.getLogger("allot")

LARGE = 256  # weights of a layer from which on its distribution can be tested
FLAT = 0.99  # share of the largest entropy
STILL = 1e-9  # share of the outputs' squares that depends on the input
ROWS = 8  # answers from which on outputs are looked at


def note_untrained(log: Log, *signs: str) -> None:
    """Put signs on record; the first one of a run is a warning. An empty text is no sign."""
    for sign in filter(None, signs):
        if not log.untrained:
            logger.warning("%s", sentence([sign]))
        log.untrained.append(sign)


def sentence(signs: list[str]) -> str:
    """The warning, from the signs on record.

    >>> sentence(["weights are random (--weights random)"])
    'the model looks untrained (weights are random (--weights random)): give it trained weights before you prune it.'
    """
    return f"the model looks untrained ({'; '.join(signs)}): give it trained weights before you prune it."


def sign_in_score(metric: str, score: float) -> str:
    """The sign of a score at chance, in words.

    >>> sign_in_score("top1", 0.1)
    'its top1 of 10.0 % is that of chance'
    """
    return f"its {metric} of {100 * score:.1f} % is that of chance"


def sign_in_weights(model: nn.Module) -> str:
    """How the weights look as if no training had touched them; empty where they do not.

    >>> sign_in_weights(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    '2 of 2 layers hold weights as torch.nn.init draws them'
    >>> with torch.no_grad():
    ...     trained = nn.Linear(32, 32)
    ...     _ = trained.weight.mul_(1.01)
    >>> sign_in_weights(trained)
    ''
    """
    layers = [(weight, bounds) for weight, bounds in _weights(model) if weight.numel() >= LARGE]
    drawn = sum(_is_uniform(weight, bounds) for weight, bounds in layers)
    if 2 * drawn > len(layers):
        return f"{drawn} of {len(layers)} layers hold weights as torch.nn.init draws them"
    norms = list(_norms(model))
    if norms and layers and all(map(_as_made, norms)):
        light = sum(_has_light_tails(weight) for weight, _ in layers)
        if 2 * light > len(layers):
            return f"all {len(norms)} normalisations are as they were made (weights 1, biases and statistics untouched)"
    return ""


def sign_in_outputs(kind: str, outputs: Sequence[Tensor]) -> str:
    """How the dense model's outputs say little about its inputs; empty where they do not.

    Args:
        kind: how they are compared, "values" or one of classes, see `allot.run.outputs`.
        outputs: `[samples, ...]` each; empty where they cannot be compared.
    """
    if not outputs or (kind == "values" and len(outputs[0]) < ROWS):
        return ""
    if kind == "values":
        return _STILL if all(_moved(wide(y).flatten(1)) <= STILL for y in outputs) else ""
    rows = [wide(y).movedim(classes(y), -1).flatten(0, -2).log_softmax(-1) for y in outputs]  # [answers, classes]
    if any(len(z) < ROWS for z in rows) or all(map(_of_length_one, map(wide, outputs))):
        return ""
    entropies = [float(-(z.exp() * z).sum(-1).mean()) / math.log(z.shape[-1]) for z in rows]
    if min(entropies) >= FLAT:
        return f"it gives all {rows[0].shape[-1]:,} classes about the same probability; if they are none, loss is mse"
    return _STILL if all(_moved(z - z.mean(-1, keepdim=True)) <= STILL for z in rows) else ""


_STILL = "it answers nearly the same for every input"


def _of_length_one(rows: Tensor) -> bool:
    """Whether all rows `[rows, ...]` have the norm 1, as embeddings that are compared by their angle: no classes."""
    return bool(((rows.flatten(1).norm(dim=1) - 1).abs() <= 1e-3).all())


def _moved(rows: Tensor) -> float:
    """The share of the squares that is variance over rows; 1 where all are 0, which says nothing."""
    squares = float(rows.double().square().mean())
    return float(rows.double().var(0, correction=0).mean()) / squares if squares else 1.0


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, set[float]]]:
    """Each weight of a layer with the bounds of the uniform draws that `torch.nn.init` and layers of torch make."""
    for module in model.modules():
        for attribute, weight in module._parameters.items():
            kind = "" if weight is None or weight.is_meta else kind_of(module, attribute, weight)
            if weight is None or kind not in _DRAWN:
                continue
            field = math.prod(weight.shape[2:])
            fan_in, fan_out = weight.shape[1] * field, weight.shape[0] * field
            if kind == "recurrent":
                fan_in = int(getattr(module, "hidden_size", fan_in))
            gains = (1 / fan_in, 3 / fan_in, 6 / fan_in, 3 / fan_out, 6 / fan_out, 6 / (fan_in + fan_out))
            yield weight.detach(), {math.sqrt(square) for square in gains}


_DRAWN = ("linear", "linear_transposed", "conv", "conv_transposed", "attention_in", "recurrent")


def _is_uniform(weight: Tensor, bounds: set[float]) -> bool:
    """Whether these may be draws from U(-b, b) with one of the bounds; of such draws, one in a thousand is not seen."""
    low, high = (float(extreme) for extreme in weight.aminmax())
    largest, n, rounding = max(high, -low), weight.numel(), 4 * torch.finfo(weight.dtype).eps
    near = [b for b in bounds if 1 - 7 / n - rounding <= largest / b <= 1 + rounding]
    if not near:
        return False
    mean_square = float(wide(weight).square().mean())
    error = 4 * math.sqrt(4 / 45 / n) + rounding  # var(u^2) = 4/45 for u ~ U(-1, 1)
    return any(abs(mean_square / b**2 - 1 / 3) <= error for b in near)


def _has_light_tails(weight: Tensor) -> bool:
    """Whether the kurtosis is at most that of a normal distribution, within four standard errors."""
    squares = wide(weight).square()
    second = float(squares.mean())
    return not second or float(squares.square().mean()) / second**2 <= 3 + 4 * math.sqrt(24 / weight.numel())


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    """The normalisations that training leaves as they are in no case: with weights that are trained, and a bias or
    statistics beside them. A weight alone may stay at 1 in 16 bits, and a frozen one anywhere.
    """
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower() and not list(module.children())
        moves = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        beside = getattr(module, "bias", None) is not None or getattr(module, "running_mean", None) is not None
        if is_norm and moves and beside:
            yield module


def _as_made(norm: nn.Module) -> bool:
    """Whether weights, biases and statistics of a normalisation have all their first values, 0 or 1."""
    values = [tensor.detach().flatten() for tensor in _held(norm) if tensor.dim() and tensor.numel()]
    return all(float(v[0]) in (0.0, 1.0) and bool((v == v[0]).all()) for v in values)


def _held(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module itself."""
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
