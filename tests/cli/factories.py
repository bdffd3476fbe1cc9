"""Models and data as users write them for `package.module:factory`, good and bad."""

from __future__ import annotations

import os
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


def mlp() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    for parameter in net[2].parameters():
        parameter.data *= 16  # logits of a net that was trained: those of a fresh one are a warning
    return net


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def wide_conv() -> nn.Module:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def pictures():
    return torch.randn(24, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def long_names() -> nn.Module:
    return nn.ModuleDict({"a_layer_with_a_name_that_nobody_would_type_twice_" * 3: nn.Linear(4, 4)})


def with_nan() -> nn.Module:
    model = mlp()
    model[0].weight.data[0, 0] = float("nan")
    return model


def without_weights() -> nn.Module:
    return nn.ReLU()


def samples():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(40, 6, generator=generator), torch.arange(40) % 4)


def answered():
    """Labels that are the answers of `mlp`, which scores above chance on them."""
    inputs = samples().tensors[0]
    return TensorDataset(inputs, mlp()(inputs).argmax(1))


def generator():
    dataset = samples()
    return (dataset[i] for i in range(len(dataset)))


def loader():
    return DataLoader(samples(), batch_size=8)


def unlabelled():
    return [inputs for inputs, _ in samples()]


def real_labels():
    return [(torch.zeros(6), 0.5)] * 3


def wide():
    return TensorDataset(torch.zeros(10, 7), torch.zeros(10, dtype=torch.long))


def empty():
    return []


def empty_generator():
    return iter(())


def breaks_off():
    yield torch.zeros(6), 0
    raise ValueError("the disk\nis gone")


def number():
    return 3


def raises():
    raise RuntimeError("first\nsecond")


def leaves():
    raise SystemExit(0)


def wants_more(argument):
    return mlp()


class Slow(nn.Module):
    """The MLP, at a pace at which it can be interrupted."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        time.sleep(0.05)
        return self.inner(x)


def slow() -> nn.Module:
    return Slow()


def never_made() -> nn.Module:
    print("waiting", flush=True)  # noqa: T201
    time.sleep(60)
    return mlp()


def interrupted():
    raise KeyboardInterrupt


class Talkative(Slow):
    def forward(self, x):
        print("forward")  # noqa: T201
        return self.inner(x)


def talkative() -> nn.Module:
    print("model made")  # noqa: T201
    return Talkative()


def talkative_data():
    for number in range(3):
        print("sample made")  # noqa: T201
        yield torch.zeros(6), number


class BadSample(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 40:
            raise RuntimeError("disk read\nfailed")
        return torch.zeros(6)


def bad_sample():
    return BadSample()


def bad_sample_in_a_worker():
    return DataLoader(BadSample(), batch_size=8, num_workers=1)


class Dies(BadSample):
    def __getitem__(self, index):
        os._exit(3)


def dying_worker():
    return DataLoader(Dies(), batch_size=8, num_workers=1)


class Leaves(BadSample):
    def __getitem__(self, index):
        raise SystemExit(0)


def leaving_sample():
    return Leaves()


def scalar():
    return torch.tensor(3.0)


class Midway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = mlp(), 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 4:
            raise RuntimeError("out of coffee")
        return self.inner(x)


def midway() -> nn.Module:
    return Midway()
