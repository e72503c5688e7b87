"""Modules that compute on integers: the parts of a model made by `to_integer`.

Between them pass *carriers*: 32-bit integers with zero point 0 on a grid known beforehand. A layer scales its carriers
to the 8-bit codes of its input, multiplies, and hands on the 32-bit sums themselves, as carriers on a finer grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Integer
from torch import Tensor, nn

from etude.compress.quantize.integer_functions import (
    dyadic,
    integer_gelu,
    integer_layer_norm,
    integer_matmul,
    integer_sigmoid,
    integer_softmax,
    integer_tanh,
    rescale,
    ties_possible,
)

__all__ = [
    "AddMask",
    "Dequantise",
    "Gather",
    "Grid",
    "IntegerAttention",
    "IntegerAverage",
    "IntegerConvolution",
    "IntegerEmbedding",
    "IntegerFunction",
    "IntegerLayerNorm",
    "IntegerLinear",
    "IntegerMatmul",
    "IntegerMaxPool",
    "IntegerParameter",
    "IntegerProduct",
    "IntegerSum",
    "QuantiseInput",
    "Rescale",
]

CARRIER_BITS = 15
"""Carriers that no layer's grid fixes have so many bits for the largest magnitude seen in calibration."""


@dataclass(frozen=True, eq=False)
class Grid:
    """What one step of an integer stands for.

    Args:
        scale: (), or one for each channel.
        axis: that counts the channels; None where there is one scale.
    """

    scale: Tensor
    axis: int | None = None

    @classmethod
    def single(cls, scale: float) -> "Grid":
        """One scale for all."""
        return cls(torch.tensor(scale, dtype=torch.float64))


def _along(values: Tensor, axis: int | None, dims: int) -> Tensor:
    """Values of channels, shaped to meet a tensor with so many axes."""
    if axis is None or values.dim() == 0:
        return values
    shape = [1] * dims
    shape[axis] = -1
    return values.view(shape)


class Rescale(nn.Module):
    """From one grid to another by a dyadic factor, then clamped, and moved by a zero point.

    Args:
        source: grid of what comes.
        scale: of what goes out.
        lowest: smallest result; None for carriers, which are not clamped.
        highest: largest result.
        zero_point: added after scaling.

    >>> Rescale(Grid.single(0.5), 1.0)(torch.tensor([3, 4, 5])).tolist()
    [2, 2, 2]
    """

    multiplier: Tensor
    shift: Tensor
    offset: Tensor

    def __init__(
        self,
        source: Grid,
        scale: float | Tensor,
        lowest: int | None = None,
        highest: int | None = None,
        zero_point: int = 0,
    ):
        super().__init__()
        factor = source.scale.double() / scale
        self.axis, self.lowest, self.highest, self.zero_point = source.axis, lowest, highest, zero_point
        self.unchanged = bool((factor == 1).all())
        multiplier, shift = dyadic(factor)
        self.ties = ties_possible(multiplier, shift)
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("shift", shift)
        self.register_buffer("offset", 1 << shift - 1)

    def negated(self) -> "Rescale":
        """This one, for the opposite of every value."""
        self.multiplier, self.unchanged = -self.multiplier, False
        return self

    def forward(self, x: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """8-bit codes where clamped to 8 bits, else 32-bit carriers."""
        if not self.unchanged:
            multiplier, shift, offset = (
                _along(each, self.axis, x.dim()) for each in (self.multiplier, self.shift, self.offset)
            )
            if self.ties:
                x = rescale(x, multiplier, shift)
            else:
                x = (x.long() * multiplier).add_(offset).bitwise_right_shift_(shift)
        if self.lowest is None or self.highest is None:
            return x.int()
        if self.zero_point:
            x = x + self.zero_point
        return x.clamp(self.lowest, self.highest).to(torch.int8 if self.highest <= 127 else torch.int32)


class QuantiseInput(nn.Module):
    """Floats to carriers: the one place where a model made by `to_integer` meets them.

    Args:
        scale: of the carriers.
        lowest: smallest carrier.
        highest: largest.
    """

    scale: Tensor

    def __init__(self, scale: float, lowest: int, highest: int):
        super().__init__()
        self.lowest, self.highest = lowest, highest
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Carriers."""
        return (x * (1 / self.scale)).round().clamp(self.lowest, self.highest).int()


class Dequantise(nn.Module):
    """Carriers to floats, at the model's end."""

    scale: Tensor

    def __init__(self, grid: Grid):
        super().__init__()
        self.axis = grid.axis
        self.register_buffer("scale", grid.scale.float())

    def forward(self, x: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Floats."""
        return x * _along(self.scale, self.axis, x.dim())


class IntegerLinear(nn.Module):
    r""":math:`W q + b` in 8-bit products, 32-bit sums and a 32-bit bias at scale :math:`S_w S_x`.

    Args:
        codes: of the weight.
        bias: (outputs,) on the grid of the sums.
        input: makes the codes of the input.
        guard: bits that sums are shifted up by, where coarse codes would leave too coarse a grid for the bias.
    """

    codes: Tensor
    bias: Tensor

    def __init__(
        self, codes: Int8[Tensor, "outputs inputs"], bias: Integer[Tensor, "outputs"], input: Rescale, guard: int = 0
    ):
        super().__init__()
        self.input, self.guard = input, guard
        # The input's zero point meets every weight.
        bias = bias - (input.zero_point * codes.long().sum(1) << guard)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("bias", bias.int())

    def forward(self, x: Integer[Tensor, "*batch inputs"]) -> Integer[Tensor, "*batch outputs"]:
        """The sums."""
        rows = self.input(x).reshape(-1, x.shape[-1])
        sums = integer_matmul(rows, self.codes.T)
        sums = sums.bitwise_left_shift_(self.guard) if self.guard else sums
        return sums.add_(self.bias).view(*x.shape[:-1], -1)


class IntegerConvolution(nn.Module):
    """A convolution as `IntegerLinear`, by products of patches with filters.

    A transposed convolution is one with flipped filters, over an input with zeros between its values.

    Args:
        codes: of the weight, outputs first.
        bias: on the grid of the sums.
        input: as of `IntegerLinear`.
        layer: gives stride, padding, dilation and groups.
        guard: as of `IntegerLinear`.
    """

    codes: Tensor
    bias: Tensor

    def __init__(
        self,
        codes: Int8[Tensor, "..."],
        bias: Integer[Tensor, "outputs"],
        input: Rescale,
        layer: Any,
        guard: int = 0,
    ):
        super().__init__()
        axes = len(layer.kernel_size)
        self.input, self.groups, self.dilation, self.kernel = input, layer.groups, layer.dilation, layer.kernel_size
        self.stride, self.spread, self.guard = layer.stride, (1,) * axes, guard
        self.padding = list(layer._reversed_padding_repeated_twice)
        if layer.transposed:
            codes = codes.flip(tuple(range(2, codes.dim())))
            self.stride, self.spread = (1,) * axes, layer.stride
            reach = [d * (k - 1) - p for d, k, p in zip(self.dilation, self.kernel, layer.padding, strict=True)]
            ends = zip(reach, layer.output_padding, strict=True)
            self.padding = [side for each, more in reversed(list(ends)) for side in (each, each + more)]
        bias = bias - (input.zero_point * codes.long().flatten(1).sum(1) << guard)
        # Channels last, as patches are laid out.
        self.register_buffer("codes", codes.movedim(1, -1).flatten(1).contiguous())
        self.register_buffer("bias", bias.int())

    def forward(self, x: Integer[Tensor, "batch channels *positions"]) -> Integer[Tensor, "batch outputs *positions2"]:
        """The sums."""
        image = F.pad(
            self._spread_out(self.input(x)).movedim(1, -1), (0, 0, *self.padding), value=self.input.zero_point
        )
        windows = self._windows(image.contiguous())
        batch, *positions = windows.shape[: 1 + len(self.kernel)]
        if self.groups == 1:
            sums = integer_matmul(windows.reshape(math.prod((batch, *positions)), -1), self.codes.T)
        else:
            parts = windows.unflatten(-1, (self.groups, -1)).movedim(-2, 0).flatten(1, 1 + len(positions))
            filters = self.codes.unflatten(0, (self.groups, -1))
            sums = (parts.flatten(2).int() @ filters.int().mT).transpose(0, 1).flatten(1)
        sums = sums.bitwise_left_shift_(self.guard) if self.guard else sums
        return sums.add_(self.bias).view(batch, *positions, -1).movedim(-1, 1)

    def _spread_out(self, codes: Tensor) -> Tensor:
        if set(self.spread) == {1}:
            return codes
        sizes = [(length - 1) * step + 1 for length, step in zip(codes.shape[2:], self.spread, strict=True)]
        spread = codes.new_full((*codes.shape[:2], *sizes), self.input.zero_point)
        places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.spread))
        spread[places] = codes
        return spread

    def _windows(self, image: Tensor) -> Integer[Tensor, "..."]:
        """What each filter sees at each position, (batch, *positions, *taps, channels), without a copy."""
        steps = image.stride()[1:-1]
        sizes = [
            (length - d * (k - 1) - 1) // s + 1
            for length, k, s, d in zip(image.shape[1:-1], self.kernel, self.stride, self.dilation, strict=True)
        ]
        moves = [s * step for s, step in zip(self.stride, steps, strict=True)]
        taps = [d * step for d, step in zip(self.dilation, steps, strict=True)]
        return image.as_strided(
            (len(image), *sizes, *self.kernel, image.shape[-1]), (image.stride(0), *moves, *taps, 1)
        )


class IntegerEmbedding(nn.Module):
    """Rows of codes, scaled to one grid as they are looked up.

    Args:
        codes: of the table.
        scale: of each row, or of all.
        target: scale of the result.
    """

    codes: Tensor
    multiplier: Tensor
    shift: Tensor

    def __init__(self, codes: Integer[Tensor, "rows features"], scale: Tensor, target: float):
        super().__init__()
        multiplier, shift = dyadic(scale.double() / target)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("shift", shift)

    def forward(self, indices: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape features"]:
        """Carriers."""
        rows = self.codes[indices]
        if self.multiplier.numel() == 1:
            return rescale(rows, self.multiplier, self.shift).int()
        return rescale(rows, self.multiplier[indices].unsqueeze(-1), self.shift[indices].unsqueeze(-1)).int()


class IntegerParameter(nn.Module):
    """A parameter or constant as carriers."""

    codes: Tensor

    def __init__(self, value: Tensor, scale: float):
        super().__init__()
        self.register_buffer("codes", (value.detach().double() / scale).round().int())

    def forward(self) -> Integer[Tensor, "..."]:
        """The carriers."""
        return self.codes


class IntegerSum(nn.Module):
    """A sum of carriers of different grids, e.g. at the end of a residual branch: both are brought to one first."""

    def __init__(self, left: Rescale, right: Rescale):
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Integer[Tensor, "*left"], y: Integer[Tensor, "*right"]) -> Integer[Tensor, "*both"]:
        """Carriers."""
        return self.left(x) + self.right(y)


class IntegerProduct(nn.Module):
    """A product of carriers, unit by unit, brought to a grid of its own."""

    def __init__(self, left: Rescale, right: Rescale, output: Rescale):
        super().__init__()
        self.left, self.right, self.output = left, right, output

    def forward(self, x: Integer[Tensor, "*left"], y: Integer[Tensor, "*right"]) -> Integer[Tensor, "*both"]:
        """Carriers."""
        return self.output(self.left(x).long() * self.right(y).long())


class Gather(nn.Module):
    """Carriers of several grids brought to one, and put side by side."""

    def __init__(self, parts: list[Rescale], dim: int):
        super().__init__()
        self.parts, self.dim = nn.ModuleList(parts), dim

    def forward(self, *values: Integer[Tensor, "..."]) -> Integer[Tensor, "..."]:
        """Carriers."""
        return torch.cat([part(value) for part, value in zip(self.parts, values, strict=True)], self.dim)


class IntegerMatmul(nn.Module):
    """The product of two activations, each brought to 8-bit codes first."""

    def __init__(self, left: Rescale, right: Rescale):
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Integer[Tensor, "..."], y: Integer[Tensor, "..."]) -> Integer[Tensor, "..."]:
        """32-bit sums."""
        return self.left(x).int() @ self.right(y).int()


class IntegerAttention(nn.Module):
    """Scaled dot-product attention: two `IntegerMatmul` around an integer softmax.

    Args:
        query: makes codes of the queries.
        key: of the keys.
        value: of the values.
        scores: brings products of queries and keys, and their scale, to the softmax's grid.
        step: of that grid.
        shares: makes codes of the softmax's shares: unsigned, as they lie in [0, 1].
    """

    def __init__(self, query: Rescale, key: Rescale, value: Rescale, scores: Rescale, step: float, shares: Rescale):
        super().__init__()
        self.query, self.key, self.value, self.scores, self.shares = query, key, value, scores, shares
        self.step = step

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Integer[Tensor, "..."]:
        """32-bit sums."""
        scores = self.scores(self.query(query).int() @ self.key(key).int().mT)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            allowed = mask if mask.dtype is torch.bool else mask == 0
            scores = scores.masked_fill(~allowed, -(2**29))
        shares, _ = integer_softmax(scores, self.step)
        return self.shares(shares).int() @ self.value(value).int()


class AddMask(nn.Module):
    """Adds what is computed from indices alone, e.g. zeros and minus infinity, to carriers of a known scale."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, x: Integer[Tensor, "*shape"], mask: Tensor) -> Integer[Tensor, "*shape2"]:
        """Carriers."""
        return x + (mask.double() / self.scale).clamp(-(2.0**29), 2.0**29).round().int()


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "gelu": integer_gelu,
    "sigmoid": integer_sigmoid,
    "softmax": integer_softmax,
    "tanh": integer_tanh,
}


class IntegerFunction(nn.Module):
    """A non-linear function on a fixed grid: GELU, softmax, sigmoid or tanh.

    Args:
        kind: which.
        input: brings carriers to the function's grid.
        step: of that grid.
        output: brings the result to carriers.
        dim: of a softmax.
    """

    def __init__(self, kind: str, input: Rescale, step: float, output: Rescale, dim: int | None = None):
        super().__init__()
        self.kind, self.input, self.step, self.output, self.dim = kind, input, step, output, dim

    @staticmethod
    def result_grid(kind: str, step: float) -> Grid:
        """Of the function itself, before ``output``."""
        zero = torch.zeros(1, 1, dtype=torch.int64)
        return Grid.single(FUNCTIONS[kind](zero, step)[1])

    def forward(self, x: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Carriers."""
        options = {} if self.dim is None else {"dim": self.dim}
        found, _ = FUNCTIONS[self.kind](self.input(x), self.step, **options)
        return self.output(found)


class IntegerLayerNorm(nn.Module):
    """Layer normalisation over the last axis, with gain and bias.

    Args:
        input: brings carriers to a grid of one scale.
        epsilon: as of `integer_layer_norm`.
        gain: a factor for each feature from the normalised values to the result's grid.
        bias: on the result's grid.
    """

    epsilon: Tensor
    multiplier: Tensor
    shift: Tensor
    bias: Tensor

    def __init__(self, input: Rescale, epsilon: int, gain: Tensor, bias: Tensor):
        super().__init__()
        multiplier, shift = dyadic(gain)
        self.input = input
        self.register_buffer("epsilon", torch.tensor(epsilon))
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("shift", shift)
        self.register_buffer("bias", bias.round().int())

    def forward(self, x: Integer[Tensor, "*batch features"]) -> Integer[Tensor, "*batch features"]:
        """Carriers."""
        normalised, _ = integer_layer_norm(self.input(x), self.epsilon)
        return rescale(normalised, self.multiplier, self.shift).int() + self.bias


class IntegerMaxPool(nn.Module):
    """Max pooling in two dimensions; integers compare as the reals they stand for."""

    def __init__(self, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]):
        super().__init__()
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation

    def forward(
        self, x: Integer[Tensor, "batch channels height width"]
    ) -> Integer[Tensor, "batch channels height2 width2"]:
        """Carriers."""
        up, left = self.padding
        padded = F.pad(x, (left, left, up, up), value=torch.iinfo(x.dtype).min)
        for axis, kernel, stride, dilation in zip((2, 3), self.kernel, self.stride, self.dilation, strict=True):
            reach = padded.shape[axis] - dilation * (kernel - 1)
            taps = [padded.narrow(axis, tap * dilation, reach) for tap in range(kernel)]
            largest = taps[0]
            for tap in taps[1:]:
                largest = torch.maximum(largest, tap)
            padded = largest[(slice(None),) * axis + (slice(None, None, stride),)]
        return padded


class IntegerAverage(nn.Module):
    """Means over axes, or over windows, as sums: the quotient goes into the grid's scale.

    Args:
        dims: axes to sum over.
        keepdim: whether they stay.
        kernel: windows over the last two axes instead.
        stride: of windows.
    """

    def __init__(
        self,
        dims: list[int] | None = None,
        keepdim: bool = False,
        kernel: list[int] | None = None,
        stride: list[int] | None = None,
    ):
        super().__init__()
        self.dims, self.keepdim, self.kernel, self.stride = dims, keepdim, kernel, stride

    def forward(self, x: Integer[Tensor, "..."]) -> Integer[Tensor, "..."]:
        """Sums."""
        if self.kernel is None or self.stride is None:
            return x.sum(self.dims, keepdim=self.keepdim, dtype=torch.int64).int()
        windows = x.unfold(-2, self.kernel[0], self.stride[0]).unfold(-2, self.kernel[1], self.stride[1])
        return windows.sum((-2, -1), dtype=torch.int64).int()
