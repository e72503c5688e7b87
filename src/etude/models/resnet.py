"""The CIFAR residual networks of He et al. (2016), with parameter-free (option A) shortcuts."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from etude.core.checks import InputError
from etude.models.initial import initialise

__all__ = ["ResNet"]


class ResNet(nn.Module):
    """ResNet-20, 32, 44, 56... for 32x32 images: 6n+2 layers, 16, 32 and 64 channels.

    Where a block halves the resolution, its shortcut takes every other pixel and pads channels with zeros
    (option A), so shortcuts have no parameters. Parameter names match the published CIFAR-10 weights, which
    `etude.data.weights` reads; those expect inputs normalised by mean (.485, .456, .406) and standard
    deviation (.229, .224, .225).

    Args:
        depth: 6n+2.
        generator: CPU generator of the initial (He) weights.
        classes: outputs.

    Shape:
        ``(batch, 3, 32, 32)`` to ``(batch, classes)``.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016.

    >>> sum(p.numel() for p in ResNet(20, torch.Generator()).parameters())
    269722
    """

    def __init__(self, depth: int, generator: torch.Generator, *, classes: int = 10):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"got {depth}", where="depth", instead="give 6n+2: 20, 32, 44, 56, 110")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)
        initialise(self, "he", generator)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Class scores."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.padding = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """``relu(branch(x) + shortcut(x))``."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        before = self.padding // 2
        return F.relu(branch + F.pad(kept, (0, 0, 0, 0, before, self.padding - before)))


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(channels_in, channels_out, stride)
    return nn.Sequential(first, *(_Block(channels_out, channels_out, 1) for _ in range(blocks - 1)))
