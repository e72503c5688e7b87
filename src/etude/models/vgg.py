"""VGG-19 for small images, with batch normalisation and one linear layer."""

import torch
from torch import nn

from etude.core.checks import check_at_least
from etude.models.initial import initialise

__all__ = ["vgg_19"]

BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
"""Channels and number of convolutions of each block."""


def vgg_19(generator: torch.Generator, *, channels: int = 3, classes: int = 10, width: float = 1.0) -> nn.Sequential:
    """VGG-19 as Frankle and Carbin (2019) train it on CIFAR-10.

    Sixteen 3x3 convolutions, each followed by batch normalisation and ReLU, in blocks of 64, 128, 256, 512 and 512
    channels with max pooling by two between them; then global average pooling and one linear layer. The
    convolutions' weights are 20.0 million.

    Args:
        generator: CPU generator of the initial (Gaussian Glorot) weights.
        channels: input channels.
        classes: outputs.
        width: factor on the numbers of channels.

    Shape:
        ``(batch, channels, height, width)``, at least 16 by 16, to ``(batch, classes)``.

    Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015.

    >>> sum(p.numel() for p in vgg_19(torch.Generator()).parameters() if p.dim() == 4)
    20018880
    """
    check_at_least("width", width, 0.0, strict=True)
    layers: list[nn.Module] = []
    count_in = channels
    for block, (count, convolutions) in enumerate(BLOCKS):
        if block:
            layers.append(nn.MaxPool2d(2))
        count_out = max(round(width * count), 1)
        for _ in range(convolutions):
            layers += [nn.Conv2d(count_in, count_out, 3, padding=1, bias=False), nn.BatchNorm2d(count_out), nn.ReLU()]
            count_in = count_out
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(count_in, classes))
    initialise(network, "glorot", generator)
    return network
