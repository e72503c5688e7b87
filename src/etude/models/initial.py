"""Draw a network's weights by a named scheme from a generator, so that a seed gives one network."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from etude.core.checks import check_one_of

__all__ = ["SCHEMES", "initialise"]


def _fans(weight: Tensor) -> tuple[int, int]:
    receptive = weight[0][0].numel() if weight.dim() > 2 else 1
    return weight.shape[1] * receptive, weight.shape[0] * receptive


SCHEMES: dict[str, Callable[[int, int], float]] = {
    "zero": lambda fan_in, fan_out: 0.0,
    "simple": lambda fan_in, fan_out: 0.1,
    "glorot": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "he": lambda fan_in, fan_out: math.sqrt(2 / fan_in),
    "sussillo-abbott": lambda fan_in, fan_out: (
        math.sqrt(2) * math.exp(1.2 / (max(fan_in, 6) - 2.4)) / math.sqrt(fan_in)
    ),
}
"""Standard deviation of a weight by fan-in and fan-out."""


@torch.no_grad()
def initialise(model: nn.Module, scheme: str, generator: torch.Generator) -> nn.Module:
    r"""Redraw the weights of linear and convolutional layers in place, and set their biases to zero.

    Weights are Gaussian with mean 0 and a standard deviation of 0 (``zero``), 0.1 (``simple``),
    :math:`\sqrt{2 / (n_\text{in} + n_\text{out})}` (``glorot``), :math:`\sqrt{2 / n_\text{in}}` (``he``), or
    Sussillo and Abbott's :math:`g / \sqrt{n_\text{in}}` with :math:`g = \sqrt{2} e^{1.2 / (\max(n_\text{in}, 6)
    - 2.4)}` for ReLU networks (``sussillo-abbott``). Other layers keep their parameters.

    Args:
        model: the network.
        scheme: one of the above.
        generator: CPU generator the weights are drawn from.

    Returns:
        ``model`` itself.

    >>> layer = initialise(nn.Linear(3, 2), "glorot", torch.Generator().manual_seed(0))
    >>> layer.bias.tolist()
    [0.0, 0.0]
    """
    deviation = SCHEMES[check_one_of("scheme", scheme, SCHEMES)]
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            draw = torch.randn(module.weight.shape, generator=generator, dtype=module.weight.dtype)
            module.weight.copy_(draw * deviation(*_fans(module.weight)))
            if module.bias is not None:
                module.bias.zero_()
    return model
