"""The nets of the zoo: a residual net, an inverted-residual net and a transformer, sized for 16x16 grey pictures.

They are small on purpose: each trains in minutes on one CPU thread, and between them they hold every kind of layer
that a sparsifier meets (3x3 and 1x1 convolutions, depthwise convolutions, skip connections with and without a
projection, batch norm, layer norm, attention with a packed projection).

Sources: He et al. 2015 (arXiv:1512.03385) section 4.2; Sandler et al. 2018 (arXiv:1801.04381) section 3;
Dosovitskiy et al. 2020 (arXiv:2010.11929) with the convolutional stem of Xiao et al. 2021 (arXiv:2106.14881).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resnet20(classes: int, width: int = 16) -> nn.Module:
    """ResNet-20 of He et al. for small pictures: `[B, 1, H, W]` to logits `[B, classes]`; untrained.

    Differences: one input channel, and a 1x1 convolution where the shape changes (the paper pads with zeros there).
    """
    return ResNet(blocks=(3, 3, 3), widths=(width, 2 * width, 4 * width), classes=classes)


def mobilenetv2(classes: int) -> nn.Module:
    """MobileNetV2 shrunk to 16x16 pictures: `[B, 1, H, W]` to logits `[B, classes]`; untrained.

    Differences: one input channel, expansion 4 instead of 6, no dropout, and two halvings instead of five.
    """
    stages = (  # expansion, channels out, blocks, stride of the first block
        (1, 16, 1, 1),
        (4, 24, 2, 2),
        (4, 32, 3, 1),
        (4, 64, 3, 2),
        (4, 96, 2, 1),
    )
    return MobileNet(stem=16, stages=stages, head=256, classes=classes)


def vit(classes: int) -> nn.Module:
    """Vision transformer with a convolutional stem: `[B, 1, 16, 16]` to logits `[B, classes]`; untrained.

    Differences: three convolutions make the 4x4 tokens, and the mean of the tokens is classified (no class token).
    """
    return VisionTransformer(stem=(24, 48), width=96, heads=4, depth=5, expansion=2, classes=classes)


class ResNet(nn.Module):
    """Three stages of residual blocks; every stage after the first halves the picture."""

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem = _conv_bn(1, widths[0], kernel=3)
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(count):
                layers.append(ResidualBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.classify = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(images)))  # [B, C, H/4, W/4]
        return self.classify(x.mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """`relu(conv(relu(conv(x))) + skip(x))`, each convolution 3x3 and followed by batch norm."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_bn(channels_in, channels_out, kernel=3, stride=stride)
        self.second = _conv_bn(channels_out, channels_out, kernel=3)
        same_shape = stride == 1 and channels_in == channels_out
        self.skip = nn.Identity() if same_shape else _conv_bn(channels_in, channels_out, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))


class MobileNet(nn.Module):
    """A stem, inverted residual blocks, a 1x1 convolution and a linear classifier."""

    def __init__(self, stem: int, stages: tuple[tuple[int, int, int, int], ...], head: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv_bn(1, stem, kernel=3), nn.ReLU6())
        layers: list[nn.Module] = []
        channels = stem
        for expansion, width, count, stride in stages:
            for block in range(count):
                layers.append(InvertedResidual(channels, width, expansion, stride if block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Sequential(_conv_bn(channels, head, kernel=1), nn.ReLU6())
        self.classify = nn.Linear(head, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(images)))  # [B, head, H/4, W/4]
        return self.classify(x.mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project (linear); a skip connection where the shape stays."""

    def __init__(self, channels_in: int, channels_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * channels_in
        expand = [] if expansion == 1 else [_conv_bn(channels_in, hidden, kernel=1), nn.ReLU6()]
        self.body = nn.Sequential(
            *expand,
            _conv_bn(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.ReLU6(),
            _conv_bn(hidden, channels_out, kernel=1),
        )
        self.has_skip = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.has_skip else self.body(x)


class VisionTransformer(nn.Module):
    """Convolutional stem to 16 tokens, pre-norm encoder blocks, mean over tokens, linear classifier."""

    def __init__(self, stem: tuple[int, int], width: int, heads: int, depth: int, expansion: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, stem[0], kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(stem[0], stem[1], kernel_size=3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(stem[1], width, kernel_size=3, stride=2, padding=1),
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)  # [B, 16, width]
        tokens = self.norm(self.blocks(tokens + self.position))
        return self.classify(tokens.mean(dim=1))


class EncoderBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


def _conv_bn(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, padded to keep the picture's size, and batch norm."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))
