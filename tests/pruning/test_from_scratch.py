"""Weights and shares of channels in one training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.errors import BudgetError, UsageError
from allot.network.channels import shapes_of
from allot.pruning.from_scratch import JointTraining, split, train


class Striped(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Stripes along, or across, with noise: two classes that a small net learns in seconds."""

    def __init__(self, samples: int = 160) -> None:
        draw = torch.Generator().manual_seed(0)
        stripes = (torch.arange(8) % 2).float().expand(8, 8)
        self.labels = torch.randint(2, (samples,), generator=draw)
        pictures = torch.stack([stripes if label else stripes.t() for label in self.labels])
        self.inputs = (pictures + 0.5 * torch.randn(samples, 8, 8, generator=draw)).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.labels[index])


def net(channels: int = 8) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride=2), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2),
    )  # fmt: skip


SHORT = JointTraining(steps=60, rate=0.1, refresh=10)


def trained(recipe: JointTraining = SHORT, budget: str = "macs=40%", **options: Any) -> Any:
    return train(net(), split(Striped(), batch_size=16), budget, recipe=recipe, **options)


def accuracy(model: nn.Module) -> float:
    data = Striped()
    with torch.no_grad():
        return float((model(data.inputs).argmax(1) == data.labels).float().mean())


def test_a_net_learns_its_weights_and_shares_together_and_is_cut_to_the_budget():
    found = trained()
    assert accuracy(found.model) > 0.9
    assert found.macs["slim"] <= 0.4 * found.macs["dense"]
    conv = found.model[3]
    assert (conv.in_channels, conv.out_channels) == tuple(map(len, found.plan.kept.values()))
    assert not found.model.training and len(found.moved) > 5


def test_the_model_passed_in_and_the_global_stream_are_left_as_they_were():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    train(model, split(Striped(), batch_size=16), "macs=60%", recipe=JointTraining(steps=8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())


def test_the_same_seed_trains_the_same_net():
    one, other = trained(JointTraining(steps=20)), trained(JointTraining(steps=20))
    assert one.plan == other.plan and one.moved == other.moved
    assert all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))


def test_every_sample_pushed_through_a_net_is_counted():
    recipe = JointTraining(steps=20, warm=0.1, together=0.5, every=2)
    pushed = {"weights": 0, "densities": 0, "all": 0}
    found = trained(recipe, on_step=lambda p: pushed.update({p.stage: pushed[p.stage] + int(p.metrics["forward"])}))
    assert pushed == {"weights": 12 * 16, "densities": 5 * 16, "all": 8 * 16}
    assert found.images == {"forward": 25 * 16, "backward": 25 * 16}


def test_running_statistics_are_those_of_the_training_even_without_fine_tuning():
    found = trained(JointTraining(steps=40, rate=0.1, warm=0.2, together=0.8))
    fresh = net()
    means = [module.running_mean for module in found.model if isinstance(module, nn.BatchNorm2d)]
    assert all(bool((mean != 0).any()) for mean in means) and shapes_of(fresh) != shapes_of(found.model)


@pytest.mark.parametrize("hold", ["implicit", "lagrangian", "admm"])
def test_every_way_of_holding_the_budget_ends_within_it(hold: str):
    recipe = JointTraining(steps=16, dsa=JointTraining().dsa.__class__(hold=hold, sampled=True, steepness=(1, 50)))
    found = trained(recipe, "params=50%")
    assert sum(parameter.numel() for parameter in found.model.parameters() if parameter.dim() > 1) <= 0.5 * (
        sum(parameter.numel() for parameter in net().parameters() if parameter.dim() > 1)
    )


def test_splits_share_no_sample_and_every_pass_sees_all_of_one():
    class Numbers(torch.utils.data.Dataset[tuple[int, int]]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> tuple[int, int]:
            return index, 0

    batches = split(Numbers(), batch_size=4, held_out=0.2)
    seen = {part: [batches(part, k)[0].tolist() for k in range(n)] for part, n in (("weights", 8), ("densities", 2))}
    flat = {part: sorted(i for batch in some for i in batch) for part, some in seen.items()}
    assert sorted(flat["weights"] + flat["densities"]) == list(range(40))
    assert batches("weights", 8)[0].tolist() != seen["weights"][0]


def test_what_cannot_be_is_one_clear_line():
    with pytest.raises(UsageError, match=r"warm=0.6 and together=0.6"):
        JointTraining(warm=0.6, together=0.6)
    with pytest.raises(UsageError, match="unknown score 'gamma'"):
        trained(score="gamma")
    with pytest.raises(UsageError, match="leaves a split empty"):
        split(Striped(4), held_out=0.01)
    with pytest.raises(BudgetError, match="Nearest that can be met"):
        trained(budget="macs=1%")
    with pytest.raises(UsageError, match="needs logits"):
        train(nn.Sequential(net(), nn.Flatten(0)), split(Striped(), batch_size=16), "macs=60%", recipe=SHORT)
