"""`bias` and `variance`: each output channel has the mean, and the spread, that it has in the dense net."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.methods import METHODS
from allot.methods.moments import OutputMoments
from allot.methods.training.selection import Selection
from allot.pruning.prune import prune
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.driver import drive
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate, Method, Problem
from contract.cases import CASES


def linear_chain(*, bias: bool = True) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(12, 12, bias=bias) for _ in range(3))).eval()


def repaired(
    model: nn.Module, inputs: Tensor, method: Method, *, sparsity: float = 0.6, batch_size: int = 1000
) -> tuple[Problem, Candidate, Candidate]:
    calibration = Calibration.of(inputs, batch_size=batch_size)
    problem = make_problem(model, Budget(sparsity=sparsity), Unstructured(), calibration=calibration)
    selected = drive(Selection(), problem, drive(METHODS["uniform"], problem, Candidate.dense(problem)))
    return problem, selected, drive(method, problem, selected)


def outputs(problem: Problem, candidate: Candidate | None, inputs: Tensor) -> dict[str, Tensor]:
    """What every layer gives, `[values, rows]` in float64: a plain loop over the modules of a copy."""
    model = copy.deepcopy(problem.model)
    if candidate:
        model.load_state_dict({**model.state_dict(), **candidate.effective(problem)})
    found: dict[str, Tensor] = {}
    for layer in problem.scope:
        module = model.get_submodule(layer.name.rpartition(".")[0])

        def hook(module: nn.Module, args: object, output: Tensor, layer=layer) -> None:
            found[layer.name] = output.movedim(layer.output_dim, -1).reshape(-1, layer.rows).double()

        module.register_forward_hook(hook)
    with torch.no_grad():
        model(inputs)
    return found


def test_bias_gives_every_layer_of_a_chain_its_dense_mean():
    inputs = torch.randn(64, 12) + 2
    problem, before, after = repaired(linear_chain(), inputs, METHODS["bias"])
    dense, wrong, right = (outputs(problem, candidate, inputs) for candidate in (None, before, after))
    for name in dense:
        assert float((wrong[name].mean(0) - dense[name].mean(0)).abs().max()) > 0.1
        torch.testing.assert_close(right[name].mean(0), dense[name].mean(0), rtol=0, atol=1e-5)
        assert torch.equal(after.effective(problem)[name], before.effective(problem)[name])


def test_variance_gives_every_layer_of_a_chain_its_dense_mean_and_spread():
    inputs = torch.randn(64, 12) + 2
    problem, before, after = repaired(linear_chain(), inputs, METHODS["variance"])
    dense, wrong, right = (outputs(problem, candidate, inputs) for candidate in (None, before, after))
    for name in dense:
        assert float((wrong[name].std(0) / dense[name].std(0)).log().abs().max()) > 0.1
        torch.testing.assert_close(right[name].mean(0), dense[name].mean(0), rtol=0, atol=1e-4)
        torch.testing.assert_close(right[name].std(0), dense[name].std(0), rtol=1e-4, atol=0)


def test_the_first_layer_is_exact_however_the_samples_are_split_and_the_others_nearly_so():
    inputs = torch.randn(60, 12) + 2
    problem, before, after = repaired(linear_chain(), inputs, METHODS["variance"], batch_size=13)
    dense, wrong, right = (outputs(problem, candidate, inputs) for candidate in (None, before, after))
    torch.testing.assert_close(right["0.weight"].mean(0), dense["0.weight"].mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(right["0.weight"].std(0), dense["0.weight"].std(0), rtol=1e-5, atol=0)
    for name in dense:
        error = (right[name].mean(0) - dense[name].mean(0)).norm()
        assert error < 0.1 * (wrong[name].mean(0) - dense[name].mean(0)).norm()


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2)])
def test_convolutions_are_corrected_per_output_channel(layer: nn.Module):
    inputs = torch.randn(16, 4, 5, 5) + 1
    problem, _, after = repaired(nn.Sequential(layer, nn.ReLU()).eval(), inputs, METHODS["variance"])
    dense, right = (outputs(problem, candidate, inputs) for candidate in (None, after))
    torch.testing.assert_close(right["0.weight"].mean(0), dense["0.weight"].mean(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(right["0.weight"].std(0), dense["0.weight"].std(0), rtol=1e-3, atol=0)


def test_zeros_stay_zeros_and_without_a_bias_only_the_spread_is_matched():
    inputs = torch.randn(64, 12) + 2
    problem, before, after = repaired(linear_chain(bias=False), inputs, METHODS["variance"])
    dense, right = (outputs(problem, candidate, inputs) for candidate in (None, after))
    torch.testing.assert_close(right["0.weight"].std(0), dense["0.weight"].std(0), rtol=1e-4, atol=0)
    assert set(after.tensors) == {"0.weight", "1.weight", "2.weight"}
    for name, mask in before.masks.items():
        assert torch.equal(after.masks[name], mask)
        assert int(after.effective(problem)[name].count_nonzero()) <= int(mask.sum())
    assert set(repaired(linear_chain(bias=False), inputs, METHODS["bias"])[2].tensors) == set()


def test_a_row_that_lost_every_weight_keeps_its_dense_mean_and_no_scale():
    model = linear_chain()
    with torch.no_grad():
        model[0].weight[3] = 1e-6 * torch.randn(12)
    inputs = torch.randn(64, 12) + 2
    problem, before, after = repaired(model, inputs, METHODS["variance"])
    assert int(before.masks["0.weight"][3].sum()) == 0
    dense, right = (outputs(problem, candidate, inputs)["0.weight"] for candidate in (None, after))
    torch.testing.assert_close(right.mean(0), dense.mean(0), rtol=0, atol=1e-5)
    assert float(right[:, 3].std()) == 0


def test_no_factor_is_beyond_the_limit():
    model = linear_chain()
    inputs = torch.randn(64, 12) * torch.tensor([100.0] * 6 + [0.01] * 6)
    with torch.no_grad():
        model[0].weight[:, :6] *= 0.01  # loud inputs have small weights: their spread is lost
    problem, before, after = repaired(model, inputs, OutputMoments(scale=True, limit=2.0), sparsity=0.5)
    ratio = after.effective(problem)["0.weight"].sum(1) / before.effective(problem)["0.weight"].sum(1)
    assert float(ratio.max()) == pytest.approx(2) and float(ratio.min()) >= 0.5 - 1e-6


@pytest.mark.parametrize("limit", [0.5, 0, -1, math.nan, "10", True, None])
def test_a_limit_below_1_or_no_number_is_refused(limit: object):
    with pytest.raises(UsageError, match=r"limit=.*1 or more"):
        OutputMoments(scale=True, limit=limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [1e-12, 1e-4, 1e6])
def test_the_correction_does_not_depend_on_the_scale_of_the_outputs(factor: float):
    inputs = torch.randn(64, 12) + 2
    model = nn.Sequential(nn.Linear(12, 12)).eval()
    plain = repaired(model, inputs, METHODS["variance"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    scaled = repaired(model, inputs, METHODS["variance"])
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(scaled[2].tensors[name] / factor, plain[2].tensors[name] / 1, rtol=1e-3, atol=1e-4)


def test_a_channel_that_is_constant_but_for_rounding_is_not_scaled():
    model = nn.Sequential(nn.Linear(12, 12)).eval()
    with torch.no_grad():
        model[0].weight[0] = 1e-9
        model[0].bias[0] = 1000.0
    problem, before, after = repaired(model, torch.randn(64, 12), METHODS["variance"])
    torch.testing.assert_close(after.effective(problem)["0.weight"][0], before.effective(problem)["0.weight"][0])


@pytest.mark.parametrize("name", ["bias", "variance"])
def test_layers_before_a_batch_norm_and_tied_layers_are_left_alone(name: str):
    normed = CASES["with batch norm"]
    _, _, after = repaired(normed.make(), normed.inputs(), METHODS[name])
    touched = {key.rpartition(".")[0] for key in after.tensors}
    assert touched == {"grouped", "out"}
    tied = CASES["tied weights"]
    _, _, after = repaired(tied.make(), tied.inputs(), METHODS[name])
    assert {key.rpartition(".")[0] for key in after.tensors} == {"3"}


def test_the_repairs_of_a_net_without_batch_norm_bring_its_outputs_nearer():
    case = CASES["without batch norm"]
    inputs = case.inputs(64)
    model = case.make()
    errors = []
    with torch.no_grad():
        for repair in ("none", "bias", "variance"):
            result = prune(model, inputs, "sparsity=0.5", repair=repair)
            used = inputs[list(result.problem.inputs().indices)]
            errors.append(float((result.model()(used) - model(used)).square().mean()))
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[0]
