r"""One and two bits: sign activations with the derivatives that train them, and trained ternary weights.

`Binary` and `Ternary` weights (BWN, BinaryConnect, TWN) are in `etude.compress.quantize.schemes`; wrap them in
`Moving` to train them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from etude.compress.quantize.granularity import PER_TENSOR, Granularity
from etude.compress.quantize.histogram import Histogram
from etude.compress.quantize.quantizers import LevelQuantizer
from etude.compress.quantize.schemes import sample_of
from etude.core.checks import check_at_least, check_fraction, check_one_of

__all__ = ["Sign", "TrainedSignQuantizer", "TrainedTernary", "TrainedTernaryQuantizer"]


@dataclass(frozen=True)
class Sign:
    r"""Signs, with a choice of the derivative that stands in for the sign's.

    Args:
        derivative: ``clip``, 1 for :math:`|x| \le 1` (BNN: Hubara et al., 2016); ``polynomial``,
            :math:`2 - 2|x|` there, of a piecewise quadratic sign (Bi-Real Net: Liu et al., 2018); ``swish``,
            :math:`\frac{\beta (2 - \beta x \tanh(\beta x / 2))}{1 + \cosh(\beta x)}`, of SignSwish (BNN+: Darabi et
            al., 2018).
        beta: sharpness of ``swish``; 5 in the paper.
        stochastic: in training, the sign drawn at random: ``sigmoid``, +1 with probability :math:`\sigma(x)` (survey,
            eq. 9); ``hard``, with probability clip((x + 1) / 2, 0, 1) (BinaryConnect); None takes the sign of x.

    >>> x = torch.tensor([-0.5, 0.2, 3.0], requires_grad=True)
    >>> signs = Sign("polynomial").fit(torch.zeros(1))(x)
    >>> signs.sum().backward()
    >>> signs.tolist(), x.grad.tolist()
    ([-1.0, 1.0, 1.0], [1.0, 1.600000023841858, 0.0])
    """

    derivative: str = "clip"
    beta: float = 5.0
    stochastic: str | None = None
    granularity: Granularity = field(default=PER_TENSOR, init=False)
    fixed: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_one_of("derivative", self.derivative, ("clip", "polynomial", "swish"))
        check_at_least("beta", self.beta, 0.0, strict=True)
        if self.stochastic is not None:
            check_one_of("stochastic", self.stochastic, ("sigmoid", "hard"))

    def fit(
        self,
        values: Tensor | Histogram,
        *,
        importance: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> "TrainedSignQuantizer":
        """The quantizer; it does not depend on ``values``, and draws from ``generator`` where it is stochastic."""
        return TrainedSignQuantizer(self, generator)


class TrainedSignQuantizer(nn.Module):
    """Signs with a chosen derivative; made by `Sign`."""

    def __init__(self, scheme: Sign, generator: torch.Generator | None = None):
        super().__init__()
        self.scheme, self.generator = scheme, generator

    def extra_repr(self) -> str:
        """The derivative."""
        return f"derivative={self.scheme.derivative!r}, stochastic={self.scheme.stochastic!r}"

    def plain(self) -> LevelQuantizer:
        """Signs without a choice."""
        return LevelQuantizer(torch.tensor([[-1.0, 1.0]]), torch.zeros(1, 1), bits=1, stored=0)

    def codes(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """0 for negative values, else 1."""
        return (x >= 0).to(torch.uint8)

    def values(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """-1 or 1."""
        return codes.float() * 2 - 1

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The signs."""
        positive = x >= 0
        if self.training and self.scheme.stochastic is not None:
            chance = torch.sigmoid(x) if self.scheme.stochastic == "sigmoid" else ((x + 1) / 2).clamp(0, 1)
            positive = torch.rand(x.shape, generator=self.generator, device=x.device) < chance.detach()
        return _Signed.apply(x, positive, self.scheme.derivative, self.scheme.beta)

    def code_bits(self) -> int:
        """Bits of one code."""
        return 1

    def codes_for(self, count: int) -> int:
        """One code a value."""
        return count

    def overhead_bits(self) -> int:
        """Nothing is stored."""
        return 0


class _Signed(torch.autograd.Function):
    """Signs forward, the chosen derivative backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positive: Tensor, derivative: str, beta: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.derivative, ctx.beta = derivative, beta
        return positive.to(x.dtype) * 2 - 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        if ctx.derivative == "clip":
            slope = (x.abs() <= 1).to(x.dtype)
        elif ctx.derivative == "polynomial":
            slope = (2 - 2 * x.abs()).clamp(min=0)
        else:
            # cosh overflows long after the slope has vanished.
            steep = (ctx.beta * x).clamp(-60, 60)
            slope = ctx.beta * (2 - steep * (steep / 2).tanh()) / (1 + steep.cosh())
        return gradient * slope, None, None, None


@dataclass(frozen=True)
class TrainedTernary:
    r"""Ternary weights with two learned levels: TTQ.

    :math:`W_p` where :math:`w > \Delta`, :math:`-W_n` where :math:`w < -\Delta`, else 0, with
    :math:`\Delta = t \max|w|`. A level's gradient is the sum over its weights; a latent weight's is scaled by its
    level, or 1 where it is zero.

    Args:
        threshold: t; 0.05 in the paper.

    Zhu et al., Trained Ternary Quantization, ICLR 2017.

    >>> TrainedTernary().fit(torch.tensor([-2.0, 0.05, 1.0, 3.0]))(torch.tensor([-2.0, 0.05, 1.0, 3.0])).tolist()
    [-2.0, 0.0, 2.0, 2.0]
    """

    threshold: float = 0.05
    granularity: Granularity = field(default=PER_TENSOR, init=False)

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold, zero=True)

    def fit(
        self,
        values: Tensor | Histogram,
        *,
        importance: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> "TrainedTernaryQuantizer":
        """The quantizer whose levels start at the mean of the values beyond the threshold on either side."""
        sample = sample_of(values, PER_TENSOR)
        delta = self.threshold * float(torch.maximum(-sample.low, sample.high))
        ends = []
        for magnitudes in (sample.values, -sample.values):
            beyond = (magnitudes > delta).to(magnitudes)
            share = float(sample.mean(beyond))
            ends.append(float(sample.mean(magnitudes * beyond)) / share if share else delta or 1.0)
        return TrainedTernaryQuantizer(ends[0], ends[1], self.threshold)


class TrainedTernaryQuantizer(nn.Module):
    """Ternary quantisation with learned levels; made by `TrainedTernary`."""

    def __init__(self, positive: float, negative: float, threshold: float):
        super().__init__()
        self.threshold = threshold
        self.positive = nn.Parameter(torch.tensor(positive))
        self.negative = nn.Parameter(torch.tensor(negative))

    def extra_repr(self) -> str:
        """The threshold."""
        return f"threshold={self.threshold}"

    def _sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        delta = self.threshold * x.detach().abs().amax()
        return x > delta, x < -delta

    @torch.no_grad()
    def codes(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """0, 1 and 2 for negative, zero and positive."""
        above, below = self._sides(x)
        return (1 + above.to(torch.int8) - below.to(torch.int8)).to(torch.uint8)

    def values(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The levels that codes name."""
        return torch.stack([-self.negative, torch.zeros_like(self.positive), self.positive])[codes.long()]

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Simulated quantisation, with the paper's gradients."""
        above, below = self._sides(x)
        one = torch.ones((), dtype=x.dtype, device=x.device)
        positive, negative = self.positive.to(x.dtype), self.negative.to(x.dtype)
        level = torch.where(above, positive, torch.where(below, -negative, 0 * one))
        slope = torch.where(above, positive, torch.where(below, negative, one)).detach()
        return level + (x - x.detach()) * slope

    def code_bits(self) -> int:
        """Bits of one code."""
        return 2

    def codes_for(self, count: int) -> int:
        """One code a value."""
        return count

    def overhead_bits(self) -> int:
        """Bits of the two levels."""
        return 64

    @torch.no_grad()
    def plain(self) -> LevelQuantizer:
        """The levels learned, for weights that already are at them."""
        levels = self.values(torch.arange(3)).unsqueeze(0)
        return LevelQuantizer(levels, levels[:, [0, 2]] / 2, bits=2, stored=2)
