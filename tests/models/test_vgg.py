"""VGG-19: the paper's size, one network a seed."""

import pytest
import torch
from torch import nn

from etude.core.checks import InputError
from etude.models import vgg_19


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_it_has_the_papers_size_and_layers():
    network = vgg_19(generator())
    convolutions = [module for module in network if isinstance(module, nn.Conv2d)]
    channels = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    assert [module.out_channels for module in convolutions] == channels
    assert sum(module.weight.numel() for module in convolutions) == 9 * sum(
        a * b for a, b in zip([3, *channels], channels, strict=False)
    )
    assert network[-1].weight.shape == (10, 512)
    assert abs(convolutions[7].weight.std().item() / (2 / (9 * 512)) ** 0.5 - 1) < 0.01


def test_images_of_several_sizes_and_widths():
    network = vgg_19(generator(), channels=1, classes=4, width=0.05)
    assert network(torch.randn(2, 1, 32, 32)).shape == network(torch.randn(2, 1, 16, 16)).shape == (2, 4)


def test_the_seed_decides():
    first, second, other = (vgg_19(generator(seed), width=0.05) for seed in (0, 0, 1))
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_width_is_checked():
    with pytest.raises(InputError, match="width"):
        vgg_19(generator(), width=0.0)
