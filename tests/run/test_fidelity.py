"""Fidelity: distances from the dense net by sample, on inputs that nothing else uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allot.errors import UsageError
from allot.pruning.prune import prune
from allot.run import fidelity
from allot.run.calibration import Calibration
from allot.run.fidelity import Fidelity, Watch
from allot.run.outputs import Comparison

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 6, generator=GENERATOR)


class Wrapped(nn.Module):
    """A linear layer whose output is put into another form."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda z: z, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.wrap = nn.Linear(6, classes), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


def watch(model: nn.Module, inputs: Any = INPUTS, batch_size: int = 7, **comparison: Any) -> Watch:
    return Watch(model, Calibration.of(inputs, batch_size=batch_size), Comparison(**comparison))


def moved(model: nn.Module, share: float = 0.5) -> dict[str, Tensor]:
    return {"inner.weight": model.inner.weight.detach() * share}


def measured(model: nn.Module, tensors: dict[str, Tensor] | None = None, **arguments: Any) -> Fidelity:
    found = watch(model, **arguments).fidelity(moved(model) if tensors is None else tensors)
    assert found is not None
    return found


def outputs(model: Wrapped) -> tuple[Tensor, Tensor]:
    """Logits of the dense net and of the net with half its weights."""
    layer = model.inner
    return F.linear(INPUTS, layer.weight, layer.bias).detach(), F.linear(INPUTS, layer.weight / 2, layer.bias).detach()


# distances


def test_logits_are_compared_by_their_kl_divergence_sample_by_sample():
    model = Wrapped()
    dense, sparse = outputs(model)
    p, q = dense.softmax(1), sparse.softmax(1)
    found = measured(model)
    assert found.kind == "kl"
    assert torch.allclose(found.values, (p * (p / q).log()).sum(1).double(), atol=1e-6)
    assert found.agreement == pytest.approx(float((dense.argmax(1) == sparse.argmax(1)).double().mean()))


def test_probabilities_give_the_distances_of_their_logits():
    logits, probabilities = (measured(Wrapped(wrap)) for wrap in (lambda z: z, lambda z: z.softmax(1)))
    assert torch.allclose(logits.values, probabilities.values, atol=1e-6)
    assert logits.agreement == probabilities.agreement


@pytest.mark.parametrize("wrap", [lambda z: z[:, :1], lambda z: z.sum(1), torch.sigmoid])
def test_values_are_compared_by_the_share_of_their_variance_that_is_lost(wrap: Callable[[Tensor], Tensor]):
    model = Wrapped(wrap)
    dense, sparse = (wrap(z).double().reshape(len(INPUTS), -1) for z in outputs(model))
    lost = (sparse - dense).square().sum(1) / ((dense - dense.mean(0)).square().sum() / len(dense))
    found = measured(model)
    assert found.kind == "error" and found.agreement is None
    assert torch.allclose(found.values, lost, rtol=1e-4)


def test_a_constant_answer_has_error_1():
    model = Wrapped(lambda z: z[:, 0])
    mean = model.inner(INPUTS)[:, 0].mean().item()
    constant = {"inner.weight": torch.zeros(5, 6), "inner.bias": torch.full((5,), mean)}
    assert measured(model, constant).mean == pytest.approx(1.0, rel=1e-4)


def test_every_output_weighs_the_same_whatever_its_scale():
    one, large = Wrapped(lambda z: (z[:, 0], z[:, 1])), Wrapped(lambda z: {"a": z[:, 0], "b": 1000 * z[:, 1] + 5e4})
    assert torch.allclose(measured(one).values, measured(large).values, rtol=1e-2)


def test_of_several_outputs_those_that_are_probabilities_say_which_class_is_on_top():
    model = Wrapped(lambda z: (z[:, :2], z[:, 2:].softmax(1)))
    dense, sparse = (z[:, 2:].argmax(1) for z in outputs(model))
    found = measured(model)
    assert found.kind == "error"
    assert found.agreement == pytest.approx(float((dense == sparse).double().mean()))


def test_positions_of_a_sequence_and_pixels_are_averaged():
    words = torch.randn(12, 3, 6, generator=GENERATOR)
    sequence = measured(Wrapped(), inputs=words)
    picture = measured(Wrapped(lambda z: z.permute(0, 2, 1)[..., None]), inputs=words)  # [B, classes, H, W]
    assert sequence.values.shape == (12,)
    assert torch.allclose(sequence.values, picture.values)
    assert sequence.agreement == picture.agreement


def test_the_dense_net_has_no_distance_from_itself():
    for wrap in (lambda z: z, lambda z: z[:, 0], lambda z: (z, z)):
        found = measured(Wrapped(wrap), {})
        assert found.mean == 0 and found.agreement in (None, 1.0)


def test_outputs_that_are_not_finite_are_infinitely_far():
    found = measured(Wrapped(), {"inner.weight": torch.full((5, 6), math.nan)})
    assert found.mean == math.inf
    assert found.to_json() == {"kl": None, "agreement": found.agreement}


def test_outputs_that_are_too_large_to_keep_are_computed_again_and_counted(monkeypatch: pytest.MonkeyPatch):
    model = Wrapped()
    kept, again = watch(model), watch(model)
    found, images = kept.fidelity(moved(model)), kept.images
    monkeypatch.setattr(fidelity, "KEPT", 0)
    other = again.fidelity(moved(model))
    assert found and other and torch.equal(found.values, other.values)
    assert (images, again.images) == (40, 80)


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (lambda z: {"boxes": z, "labels": z.argmax(1)}, "cannot be compared"),
        (lambda z: z.sum(), "does not count samples"),
        (lambda z: z[z[:, 0] > 0], "does not count samples"),
        (lambda z: SimpleNamespace(boxes=z), "cannot be compared"),
    ],
)
def test_outputs_that_cannot_be_compared_say_why(wrap: Callable[[Tensor], Any], reason: str):
    model = Wrapped(wrap)
    watched = watch(model)
    assert watched.fidelity(moved(model)) is None
    assert reason in watched.reason


def test_a_function_makes_them_comparable():
    model = Wrapped(lambda z: {"boxes": z, "labels": z.argmax(1)})
    assert measured(model, outputs=lambda output: output["boxes"], loss="mse").kind == "error"
    with pytest.raises(UsageError, match="did you mean 'kl'"):
        Comparison(loss="kk")


# comparisons


def fidelities(*values: list[float]) -> list[Fidelity]:
    return [Fidelity("kl", torch.tensor(v, dtype=torch.float64), None) for v in values]


def test_a_difference_within_its_standard_error_is_none():
    before = torch.randn(64, generator=GENERATOR).double().exp()
    noise = torch.randn(64, generator=GENERATOR).double()
    noise = noise - noise.mean()
    error = float(noise.std()) / 8
    first = Fidelity("kl", before, None)
    assert not Fidelity("kl", before + noise + 0.9 * error, None).is_worse_than(first)
    assert Fidelity("kl", before + noise + 1.1 * error, None).is_worse_than(first)
    # sample by sample: values that vary much between samples hide nothing
    assert Fidelity("kl", before + 1e-3, None).is_worse_than(first)


def test_a_single_sample_has_to_double_its_distance():
    near, nearly_twice, far = fidelities([1.0], [1.9], [2.1])
    assert not nearly_twice.is_worse_than(near) and far.is_worse_than(near)


def test_what_is_not_finite_is_worse_than_what_is():
    finite, infinite = fidelities([1.0, 2.0], [1.0, math.inf])
    assert infinite.is_worse_than(finite) and not finite.is_worse_than(infinite)
    assert not infinite.is_worse_than(infinite)


# the watch set


@pytest.mark.parametrize(
    ("count", "watched"), [(2, 1), (8, 1), (16, 2), (31, 3), (32, 16), (128, 16), (512, 64), (1024, 128), (4096, 128)]
)
def test_an_eighth_of_the_inputs_is_watched_and_serves_nothing_else(count: int, watched: int):
    used, watch = Calibration.of(torch.zeros(count, 1), samples=count).parted()
    assert len(watch) == watched and len(used) == count - watched
    assert sorted([*used.indices, *watch.indices]) == list(range(count))


def test_the_watch_set_is_drawn_by_the_seed_whatever_the_order_of_the_data():
    first, again, other = (Calibration.of(torch.zeros(64, 1), seed=s).parted()[1].indices for s in (0, 0, 1))
    assert first == again != other
    assert set(first) != set(range(48, 64)) and set(first) != set(range(16))


def test_a_single_input_is_used_and_watched():
    used, watch = Calibration.of(torch.zeros(1, 1)).parted()
    assert used.indices == watch.indices == (0,)


def test_training_reads_outputs_as_the_watch_set_does():
    """Outputs of these inputs are within 0 and 1, of the watched ones they are not: one of both decides."""

    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).sigmoid() * x[:, :1]

    scales = torch.ones(64)
    inputs = torch.rand(64, 4)
    problem = prune(Bounded(), torch.cat([scales[:, None], inputs[:, 1:]], 1), "sparsity=0.5", repair="none").problem
    assert problem.reading().kind == problem.watch.kind == "values"
    watched = list(problem.watch.inputs.indices)
    scales[watched] = 5.0
    problem = prune(Bounded(), torch.cat([scales[:, None], inputs[:, 1:]], 1), "sparsity=0.5", repair="none").problem
    assert problem.reading().kind == problem.watch.kind == "logits"


def test_the_divergence_of_equal_outputs_is_never_below_zero():
    logits = 30 * torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    shifted = logits + 1e-6 * torch.randn(500, 7, generator=torch.Generator().manual_seed(1))
    assert float(fidelity.distance(shifted, logits, None).min()) >= 0
