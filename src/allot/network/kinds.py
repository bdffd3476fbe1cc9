"""Which kind of layer a parameter is, by the module that holds it: the only file that knows a conv from a linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ATTENTION_INPUTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
STACK = "stack"  # of matrices, one an expert: only inputs tell which dimension a product sums over
EXPERTS = ("experts", "experts_transposed")  # the two forms of a stack
UNDECIDED = "without inputs (3 dimensions)"
FROZEN = "frozen (requires_grad=False) beside trained weights: it stays as it is"
INSIDE = ("recurrent", "lookup", *EXPERTS)  # no module's output is the product of its input and the weight alone


def kind_of(module: nn.Module, attribute: str, parameter: Tensor) -> str:
    """Kind of layer as in `Layer`, or `STACK`; "" where the parameter cannot be pruned.

    >>> kind_of(nn.GRU(4, 3), "weight_hh_l0", nn.GRU(4, 3).weight_hh_l0)
    'recurrent'
    """
    uninitialised = isinstance(parameter, nn.parameter.UninitializedParameter)
    if uninitialised or parameter.dtype not in FLOATS or parameter.numel() == 0:
        return ""
    if isinstance(module, nn.MultiheadAttention):
        return "attention_in" if attribute in ATTENTION_INPUTS else ""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent" if attribute.startswith("weight_") and parameter.dim() == 2 else ""
    if attribute == "weight" and isinstance(module, nn.modules.conv._ConvNd) and parameter.dim() > 2:
        return "conv_transposed" if isinstance(module, nn.modules.conv._ConvTransposeNd) else "conv"
    if attribute == "weight" and parameter.dim() == 2:
        return _kind_of_matrix(module)
    return _kind_of_stack(module, attribute, parameter) if parameter.dim() == 3 else ""


def _kind_of_matrix(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "lookup"
    # by name: transformers is optional, and its Conv1D is a linear layer stored [in, out]
    if any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__):
        return "linear_transposed"
    return ""


def _kind_of_stack(module: nn.Module, attribute: str, parameter: Tensor) -> str:
    if _is_parametrized(module, attribute) or "bias" in attribute or "norm" in type(module).__name__.lower():
        return ""
    transposed = getattr(module, "is_transposed", None)  # the fused experts of transformers have it
    if isinstance(transposed, bool) and getattr(module, "num_experts", None) == len(parameter):
        return EXPERTS[transposed]
    return STACK


def _is_parametrized(module: nn.Module, attribute: str) -> bool:
    return isinstance(module, parametrize.ParametrizationList) or attribute in ("weight_g", "weight_v", "weight_orig")


def reason_to_skip(module: nn.Module, attribute: str, parameter: Tensor) -> str:
    """Why a parameter stays dense, as the report shows it."""
    owner = type(module).__name__
    if parameter.dtype not in FLOATS:
        return f"{str(parameter.dtype).removeprefix('torch.')} values; only 16 to 64 bit floating point is pruned"
    if parameter.numel() == 0:
        return "empty"
    if _is_parametrized(module, attribute):
        return "parametrized: remove the parametrization first"
    if "bias" in attribute and (parameter.dim() < 2 or isinstance(module, nn.MultiheadAttention)):
        return "bias"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "lookup table, not a matrix product"
    if "norm" in owner.lower():
        return f"normalisation ({owner})"
    return f"{attribute} of {owner}: not the weight of a layer that allot knows"
