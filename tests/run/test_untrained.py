"""Models that were never trained are reported as such, and trained ones are not."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allot
from allot.report.fidelity import warnings
from allot.run.calibration import Calibration
from allot.run.evaluate import Score, evaluate
from allot.run.fidelity import Watch
from allot.run.outputs import Comparison
from allot.run.untrained import sign_in_outputs, sign_in_weights

ZOO = ("digits-resnet20", "glyph-mobilenetv2", "glyph-resnet20", "glyph-vit")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def gaussian() -> nn.Module:
    """As vision models are made: weights normal, norms as torch makes them."""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3, bias=False)
    )
    for module in net:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return net


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2)
        self.head = nn.Linear(32, 16)


def xavier() -> nn.Module:
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    for module in net:
        nn.init.xavier_uniform_(module.weight)
    return net


FRESH = {
    "linear": mlp,
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=2), nn.ConvTranspose2d(16, 8, 3)),
    "recurrent": lambda: nn.LSTM(12, 24),
    "attention": Attention,
    "xavier": xavier,
    "normal, with norms": gaussian,
    "half": lambda: mlp().half(),
    "bfloat16": lambda: mlp().bfloat16(),
    "encoder": lambda: nn.TransformerEncoderLayer(32, 2, 64),
}


def blobs(n: int = 256, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Four classes around four centres, of which a linear net makes a task."""
    labels = torch.arange(n) % 4
    return rand(4, 16, seed=9)[labels] + 0.3 * rand(n, 16, seed=seed), labels


def trained(net: nn.Module, *, steps: int, lr: float = 0.05, decay: float = 0.0) -> nn.Module:
    x, y = blobs()
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", FRESH)
def test_weights_as_they_were_drawn_are_seen(case: str, seed: int):
    assert sign_in_weights(seeded(FRESH[case], seed))


def seen(watch: Watch) -> str:
    return sign_in_outputs(watch.kind, watch.dense_outputs())


@pytest.mark.parametrize("name", ZOO)
def test_the_trained_nets_of_the_zoo_show_no_sign(name: str):
    net, data = allot.zoo.model(name), allot.zoo.data(name.partition("-")[0], "calibration")
    assert sign_in_weights(net) == ""
    assert seen(Watch(net, Calibration.of(data, samples=16), Comparison())) == ""


@pytest.mark.parametrize("lr", [1e-3, 0.05])
@pytest.mark.parametrize("seed", range(3))
def test_a_few_steps_of_training_are_enough_for_weights_without_a_sign(seed: int, lr: float):
    assert sign_in_weights(trained(seeded(mlp, seed), steps=20, lr=lr)) == ""


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_a_small_trained_net_shows_no_sign_anywhere(seed: int, decay: float):
    net = trained(seeded(mlp, seed), steps=100, decay=decay).eval()
    x, y = blobs(seed=2)
    watch = Watch(net, Calibration.of(x, samples=32), Comparison())
    assert (sign_in_weights(net), seen(watch)) == ("", "")
    assert not evaluate(net, list(zip(x, y.tolist(), strict=True))).at_chance


def test_a_trained_body_with_a_new_head_shows_no_sign():
    net = trained(seeded(mlp), steps=20)
    net[4] = seeded(lambda: nn.Linear(32, 10))
    assert sign_in_weights(net) == ""


def test_training_shows_in_the_norms_of_a_net_that_was_drawn_from_a_normal_distribution():
    net = seeded(gaussian)
    net.train()(rand(4, 3, 8, 8))  # statistics
    assert sign_in_weights(net) == ""


def test_norms_that_hold_nothing_are_no_evidence():
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.InstanceNorm2d(32), nn.Conv2d(32, 16, 3))
    for conv in (net[0], net[2]):
        nn.init.normal_(conv.weight, std=0.3)
    assert sign_in_weights(net) == ""


def watched(outputs: Callable[[Tensor], Tensor], loss: str | None = None) -> str:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return outputs(x)

    return seen(Watch(Net(), Calibration.of(rand(16, 8), samples=16), Comparison(loss=loss)))


@pytest.mark.parametrize(
    ("outputs", "loss", "sign"),
    [
        (lambda x: 0.01 * x, None, "all 8 classes about the same probability"),
        (lambda x: (0.01 * x).softmax(-1), None, "all 8 classes about the same probability"),
        (lambda x: 5 * x, None, ""),
        (lambda x: 5 * x.softmax(-1), None, ""),
        (lambda x: torch.arange(8.0) + 1e-5 * x, None, "nearly the same for every input"),
        (lambda x: torch.arange(8.0) + x, None, ""),
        (lambda x: 1990 + 10 * x, "mse", ""),
        (lambda x: 0.001 * x, "mse", ""),
        (lambda x: 1 + 1e-5 * x, "mse", "nearly the same for every input"),
        (lambda x: torch.zeros_like(x), "mse", ""),  # its scale is not known
        (lambda x: 0.01 * x[..., None, None].expand(-1, -1, 3, 3), None, "all 8 classes"),
    ],
)
def test_outputs_are_judged_by_their_entropy_and_by_how_far_inputs_move_them(outputs, loss, sign):
    found = watched(outputs, loss)
    assert sign in found and bool(sign) == bool(found)


def permuted_share(answers: Tensor, labels: Tensor, rounds: int = 2000) -> float:
    draws = torch.Generator().manual_seed(0)
    shuffled = (answers[torch.randperm(len(answers), generator=draws)] == labels for _ in range(rounds))
    return sum(float(same.double().mean()) for same in shuffled) / rounds


def test_chance_is_what_shuffled_answers_score():
    logits, labels = rand(60, 4), torch.arange(60) % 3
    score = evaluate(nn.Identity(), list(zip(logits, labels.tolist(), strict=True)), batch_size=7)
    assert score.chance == pytest.approx(permuted_share(logits.argmax(1), labels), abs=0.005)


@pytest.mark.parametrize(
    ("score", "chance", "samples", "at_chance"),
    [
        (0.1, 0.1, 800, True),
        (0.13, 0.1, 800, True),
        (0.2, 0.1, 800, False),
        (0.97, 0.1, 20, False),
        (0.5, 0.5, 20, False),  # too few to tell
        (0.99, 0.98, 1000, False),  # half of the rare class is found
        (0.98, 0.98, 1000, False),  # one class nearly alone: too few of the others to tell
        (1.0, 1.0, 1000, False),
    ],
)
def test_a_score_is_at_chance_where_it_is_near_it_and_enough_samples_say_so(score, chance, samples, at_chance):
    assert Score("top1", score, samples, chance=chance).at_chance == at_chance


def test_labels_that_are_no_classes_and_own_metrics_have_no_chance():
    samples = [(rand(3), 7), (rand(3), 1)]
    assert evaluate(nn.Identity(), samples).chance is None
    assert evaluate(nn.Identity(), samples, metric=lambda outputs, targets: 0.5).at_chance is False


def test_the_first_sign_is_a_warning_and_all_stand_in_the_report(tmp_path, caplog: pytest.LogCaptureFixture):
    x, y = blobs()
    test = list(zip(x, y.tolist(), strict=True))
    arguments = {"method": "erk", "test": test, "save_to": tmp_path / "run"}
    with caplog.at_level(logging.WARNING, "allot"):
        report = allot.prune(seeded(mlp), x, "sparsity=0.5", **arguments).report()
    said = [record.getMessage() for record in caplog.records if "untrained" in record.getMessage()]
    assert len(said) == 1 and "2 of 2 layers hold weights as torch.nn.init draws them" in said[0]
    assert warnings(report)[0].startswith("warning: the model looks untrained (2 of 2 layers")
    assert "looks untrained" in (tmp_path / "run" / "report.html").read_text()
    again = allot.prune(seeded(mlp), x, "sparsity=0.5", **arguments)  # a finished run, opened
    assert again.report()["untrained"] == report["untrained"]


def test_a_score_at_chance_is_a_sign_of_its_own(caplog: pytest.LogCaptureFixture):
    net = trained(seeded(mlp), steps=100)
    x, _ = blobs()
    shuffled = list(zip(x, torch.randint(4, (256,), generator=torch.Generator().manual_seed(0)).tolist(), strict=True))
    with caplog.at_level(logging.WARNING, "allot"):
        report = allot.prune(net, None, "sparsity=0.5", method="erk", repair="none", test=shuffled).report()
    (sign,) = report["untrained"]
    assert sign.startswith("its top1 of ") and sign.endswith(" % is that of chance") and sign in caplog.text


def test_a_trained_net_is_not_called_untrained(caplog: pytest.LogCaptureFixture):
    net, (x, y) = trained(seeded(mlp), steps=100), blobs()
    with caplog.at_level(logging.WARNING, "allot"):
        result = allot.prune(net, x, "sparsity=0.5", method="erk", test=list(zip(x, y.tolist(), strict=True)))
    assert result.report()["untrained"] == [] and "untrained" not in caplog.text


def test_weights_at_random_are_known_from_the_recipe():
    net = trained(seeded(mlp), steps=100)
    result = allot.prune(net, None, "sparsity=0.5", repair="none", recipe={"weights": "random"})
    assert result.report()["untrained"] == ["its weights are random"]


def test_norms_that_cannot_show_training_are_no_sign():
    def net(norm: nn.Module) -> nn.Module:
        layers = [nn.Linear(32, 32), norm, nn.Linear(32, 32)]
        for layer in layers[::2]:
            nn.init.normal_(layer.weight, std=0.1)
        return nn.Sequential(*layers)

    assert "normalisations are as they were made" in sign_in_weights(net(nn.LayerNorm(32)))
    assert sign_in_weights(net(nn.RMSNorm(32))) == ""  # in 16 bits, weights of 1 stay 1
    assert sign_in_weights(net(nn.LayerNorm(32).requires_grad_(False))) == ""


def test_embeddings_of_length_one_and_large_values_are_no_sign():
    assert watched(lambda x: nn.functional.normalize(x, dim=1)) == ""
    assert watched(lambda x: 1000 + 0.3 * x, "mse") == ""
