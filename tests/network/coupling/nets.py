"""Small nets of every way in which channels hang together, in eval mode, with weights that depend on names alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def filled(model: nn.Module) -> nn.Module:
    """`model` in eval mode with values that depend on names and shapes alone."""
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or id(tensor) in done:
                continue
            done.add(id(tensor))
            draw = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
            scale = (tensor.numel() / tensor.shape[0]) ** -0.5 if tensor.dim() > 1 else 0.3
            tensor.copy_(draw * scale)
            if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.abs_().add_(0.5)
    return model.eval()


def conv(inside: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Keeps the size of the picture; no bias unless asked for."""
    return nn.Conv2d(inside, out, kernel, padding=kernel // 2, **{"bias": False, **options})


class Residual(nn.Module):
    """A basic block; the shortcut is a conv where `inside` differs from `out`."""

    def __init__(self, inside: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inside, out, stride=stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if inside != out:
            self.shortcut = nn.Sequential(conv(inside, out, 1, stride=stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 6), nn.BatchNorm2d(6)
        self.layer1, self.layer2 = Residual(6, 6), Residual(6, 8, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Inverted(nn.Module):
    """Expand, depthwise, project; a residual around it where shapes allow."""

    def __init__(self, inside: int, wide: int, out: int) -> None:
        super().__init__()
        self.expand, self.bn1 = conv(inside, wide, 1), nn.BatchNorm2d(wide)
        self.depthwise, self.bn2 = conv(wide, wide, groups=wide), nn.BatchNorm2d(wide)
        self.project, self.bn3 = conv(wide, out, 1), nn.BatchNorm2d(out)
        self.residual = inside == out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.expand(x)))
        y = self.bn3(self.project(F.relu6(self.bn2(self.depthwise(y)))))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4, bias=True)
        self.block1, self.block2 = Inverted(4, 10, 4), Inverted(4, 12, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block2(self.block1(self.stem(x))).mean((2, 3)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), conv(6, 4)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), conv(10, 5)
        self.norm3, self.fc = nn.BatchNorm2d(15), nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat((x, self.conv1(F.relu(self.norm1(x)))), 1)
        x = torch.cat((x, self.conv2(F.relu(self.norm2(x)))), 1)
        return self.fc(F.relu(self.norm3(x)).mean((2, 3)))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.pooled = conv(3, 4, 1, bias=True), conv(3, 6), conv(3, 5, 1)
        self.deep = conv(6, 7)
        self.mix, self.norm = conv(16, 8, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.one(x), self.deep(F.relu(self.three(x))), self.pooled(F.avg_pool2d(x, 3, 1, 1))
        x = F.relu(self.norm(self.mix(F.elu(torch.cat(branches, 1)))))
        return self.fc(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.mix, self.fc = conv(8, 6, bias=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.stem(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.fc(F.hardswish(self.mix(x * gate)).mean((2, 3)))


class Block(nn.Module):
    """A block of a transformer around the given attention."""

    def __init__(self, width: int, hidden: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), attention
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if isinstance(self.attention, LinearAttention):
            x = x + self.attention(y)
        else:  # as it was made, or with fewer heads
            x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LinearAttention(nn.Module):
    """Queries, keys and values of one linear layer, as timm has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        shares = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((shares @ v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.places = nn.Parameter(torch.zeros(1, 4, 12))
        self.blocks = nn.Sequential(*(Block(12, 10, attention()) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


class Grouped(nn.Module):
    """A conv of two groups between full ones."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.stem, self.norm1 = conv(3, 8), nn.BatchNorm2d(8)
        self.grouped, self.norm2 = conv(8, 12, groups=groups), nn.BatchNorm2d(12)
        self.mix, self.fc = conv(12, 6, 1, bias=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm2(self.grouped(F.relu(self.norm1(self.stem(x))))))
        return self.fc(F.relu(self.mix(x)).mean((2, 3)))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 5, bias=True), nn.Conv2d(5, 6, 3, stride=2)
        self.hidden, self.norm, self.out = nn.Linear(6 * 9, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 1)
        x = torch.flatten(F.relu(self.conv2(x)), 1)
        return self.out(F.relu(self.norm(self.hidden(x))))


class Gated(nn.Module):
    """Halves that multiply each other: by `glu`, and by `chunk`."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.mix, self.up = conv(3, 12, bias=True), conv(6, 5), nn.Linear(5, 16)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(F.glu(self.wide(x), 1)).mean((2, 3))
        gate, value = self.up(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class Tied(nn.Module):
    """Two layers with one weight, one behind the other, and layers of their own around."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.first, self.second, self.between = conv(3, 6), conv(6, 6), conv(6, 6), conv(6, 6, 1, bias=True)
        self.second.weight = self.first.weight
        self.mix, self.out = conv(6, 7, bias=True), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.relu(self.into(x))))
        x = F.relu(self.second(F.relu(self.between(x))))
        return self.out(F.relu(self.mix(x)).mean((2, 3)))


class Plain(nn.Module):
    """Convs with biases and no norm, ahead of what is not zero at zero; a PReLU per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.slope = conv(3, 7, bias=True), nn.PReLU(7)
        self.conv2, self.conv3 = conv(7, 6, bias=True), conv(6, 4, 1, bias=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.conv2(self.slope(self.conv1(x))))
        return self.fc(F.softplus(self.conv3(x)).mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm1 = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.up, self.norm2 = nn.ConvTranspose2d(6, 8, 2, stride=2), nn.BatchNorm2d(8)
        self.again, self.out = nn.ConvTranspose2d(8, 4, 3, padding=1, bias=False), conv(4, 3, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm2(self.up(F.relu(self.norm1(self.down(x))))))
        return self.out(F.relu(self.again(x)))


class Instances(nn.Module):
    """Norms of each channel of each picture, which hold no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(3, 6, bias=True), nn.InstanceNorm2d(6)
        self.conv2, self.norm2 = conv(6, 8, bias=True), nn.InstanceNorm2d(8, affine=True)
        self.out = conv(8, 3, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.out(x)


class Shared(nn.Module):
    """One tower on both pictures, as detectors and siamese nets have it, at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = conv(3, 6), nn.BatchNorm2d(6), conv(6, 6)
        self.head, self.out = conv(6, 5, bias=True), nn.Linear(5, 4)

    def tower(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        return F.relu(self.head(F.relu(self.conv2(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.tower(x) - self.tower(F.avg_pool2d(x, 2)))


class Scaled(nn.Module):
    """A residual branch with a factor per channel that is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = conv(3, 6, bias=True), conv(6, 6, groups=6)
        self.up, self.down = conv(6, 9, 1, bias=True), conv(9, 6, 1, bias=True)
        self.scale, self.fc = nn.Parameter(torch.zeros(6, 1, 1)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale * self.down(F.gelu(self.up(self.depthwise(x))))
        return self.fc(x.mean((2, 3)))


PICTURE = (3, 8, 8)
NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "mobilenet": MobileNet,
    "densenet": DenseNet,
    "inception": Inception,
    "squeeze-excite": SqueezeExcite,
    "vit": lambda: ViT(lambda: nn.MultiheadAttention(12, 4, batch_first=True)),
    "vit of linears": lambda: ViT(lambda: LinearAttention(12, 3)),
    "grouped conv": Grouped,
    "flattened": Flattened,
    "gated halves": Gated,
    "tied weights": Tied,
    "biases without norms": Plain,
    "transposed": Transposed,
    "instance norm": Instances,
    "applied twice": Shared,
    "scaled branch": Scaled,
}


def net(name: str) -> nn.Module:
    """A fresh net of this name, always the same."""
    return filled(NETS[name]())


def picture(samples: int = 1, seed: int = 7) -> Tensor:
    return torch.randn(samples, *PICTURE, generator=torch.Generator().manual_seed(seed))


# callers of other shapes


class ByName(nn.Module):
    """Takes its inputs by name, or two by position."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = conv(3, 6, bias=True), conv(2, 6, bias=True), nn.Linear(6, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(F.relu(self.left(left) + self.right(right)).mean((2, 3)))


@dataclass
class Answer(OrderedDict):
    """What transformers return: a dataclass that is a mapping too."""

    logits: Tensor
    states: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        super().__init__(logits=self.logits, states=self.states)


@dataclass
class Record:
    """A plain dataclass."""

    logits: Tensor


class Answering(nn.Module):
    """A resnet whose answer is wrapped."""

    def __init__(self, wrapped: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.wrapped = ResNet(), wrapped

    def forward(self, x: Tensor) -> Any:
        return self.wrapped(self.body(x))
