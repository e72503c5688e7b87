r"""Against outliers: channels split in two, bits given by channel, channel means and variances put right.

Zhao et al., Improving Neural Network Quantization without Retraining using Outlier Channel Splitting, ICML 2019.
Banner et al., Post Training 4-bit Quantization of Convolutional Networks for Rapid-Deployment (ACIQ), NeurIPS 2019.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from etude.compress.quantize.calibration import MIN_MAX, Calibration
from etude.compress.quantize.granularity import PER_TENSOR, Granularity, PerChannel
from etude.compress.quantize.histogram import Histogram
from etude.compress.quantize.layers import is_conv1d, output_first, supported
from etude.compress.quantize.model import Inputs, observe, quantized_layers, replace_modules
from etude.compress.quantize.schemes import TINY, Uniform, check_bits, sample_of
from etude.core.checks import InputError, check_at_least, check_fraction, check_one_of
from etude.core.sites import sites

__all__ = [
    "ChannelBits",
    "ChannelBitsQuantizer",
    "CorrectedQuantizer",
    "SplitChannels",
    "channel_bits",
    "correct_weights",
    "split_outliers",
]


class SplitChannels(nn.Module):
    """A layer some of whose input channels come twice; made by `split_outliers`.

    Args:
        layer: the wider layer.
        index: for each of its inputs, which input of the original layer it is.
        factor: for each, what that is multiplied by.
        shift: for each, what is added then.
        axis: of the channels in the layer's input.
    """

    index: Tensor
    factor: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        index: Integer[Tensor, "inputs"],
        axis: int,
        factor: Float[Tensor, "inputs"] | None = None,
        shift: Float[Tensor, "inputs"] | None = None,
    ):
        super().__init__()
        self.layer, self.axis = layer, axis
        self.register_buffer("index", index)
        self.register_buffer("factor", factor)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output on the inputs, some of them twice."""
        wide = x.index_select(self.axis, self.index)
        if self.factor is not None and self.shift is not None:
            shape = [-1 if axis == self.axis % x.dim() else 1 for axis in range(x.dim())]
            wide = wide * self.factor.view(shape) + self.shift.view(shape)
        return self.layer(wide)


@torch.no_grad()
def split_outliers(
    model: nn.Module,
    share: float = 0.02,
    *,
    bits: int | None = None,
    of: str = "weights",
    inputs: Inputs | None = None,
    patterns: str | Sequence[str] = "**",
) -> nn.Module:
    r"""A copy of ``model`` in which input channels that hold the largest values are split in two; the same function.

    One after the other, the channel with the largest weight (or the largest activation) comes twice, with halves of its
    weights w (or activations), which halves the range that a scale must cover. The halves are
    :math:`\frac12 (w \mp \frac{S}{2})`, which round so that they add up to the rounded w; S is the step that ``bits``
    give at the time.

    Args:
        model: a float model; its linear layers and ungrouped convolutions become `SplitChannels`, whose ``layer`` is
            what `quantize` finds.
        share: of each layer's input channels to split, rounded up; the paper takes 0.01 to 0.05.
        bits: of the quantisation to come; None splits into equal halves.
        of: ``weights``, or ``activations``, which are then halved in front of the layer.
        inputs: examples, a batch or batches, for ``activations``.
        patterns: paths or globs of the layers.

    Raises:
        InputError: for unusable arguments, or if no layer can be split.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> split, x = split_outliers(model, 0.5), torch.ones(3, 2)
    >>> split[0].layer.weight.shape, torch.allclose(split(x), model(x))
    (torch.Size([1, 3]), True)
    """
    check_fraction("share", share, one=True)
    check_one_of("of", of, ("weights", "activations"))
    if bits is not None:
        check_bits(bits, least=2)
    network = copy.deepcopy(model)
    layers = {path: network.get_submodule(path) for path in sites(network, patterns) if _can_split(network, path)}
    if not layers:
        raise InputError("no linear layer or ungrouped convolution there", where="patterns", instead="name some")
    largest: dict[str, Tensor] = {}
    if of == "activations":
        if inputs is None:
            raise InputError("got none", where="inputs", instead="give examples, or of='weights'")
        grains: dict[str, Granularity] = {path: PerChannel(_input_axis(layer)) for path, layer in layers.items()}
        for path, histogram in observe(network, inputs, grains, bins=2).items():
            sample = histogram.sample()
            largest[path] = torch.maximum(-sample.low, sample.high)
    replaced: dict[int, nn.Module] = {}
    for path, layer in layers.items():
        split = (
            _split_weights(layer, share, bits) if of == "weights" else _split_inputs(layer, share, bits, largest[path])
        )
        replaced[id(layer)] = split.train(layer.training)
    return replace_modules(network, replaced)


def _can_split(network: nn.Module, path: str) -> bool:
    module: Any = network.get_submodule(path)
    if not supported(module) or isinstance(module, nn.Embedding | nn.modules.conv._ConvTransposeNd):
        return False
    parent = network.get_submodule(path.rpartition(".")[0]) if path else None
    # Torch's attention reads its output layer's weight itself.
    return getattr(module, "groups", 1) == 1 and not isinstance(parent, nn.MultiheadAttention)


def _input_axis(layer: nn.Module) -> int:
    return -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1


def _step(largest: Tensor, bits: int | None) -> Tensor:
    return torch.zeros_like(largest) if bits is None else largest / (2 ** (bits - 1) - 1)


def _split_weights(layer: nn.Module, share: float, bits: int | None) -> SplitChannels:
    weight = output_first(layer, layer.weight).clone()  # type: ignore[arg-type]
    columns = weight.shape[1]
    index = torch.arange(columns, device=weight.device)
    for _ in range(math.ceil(share * columns)):
        sizes = weight.abs().transpose(0, 1).flatten(1).amax(1)
        channel = int(sizes.argmax())
        half = _step(sizes[channel], bits) / 2
        values = weight[:, channel].clone()
        weight[:, channel] = (values - half) / 2
        weight = torch.cat([weight, ((values + half) / 2).unsqueeze(1)], 1)
        index = torch.cat([index, index[channel].unsqueeze(0)])
    return SplitChannels(_wider(layer, weight), index, _input_axis(layer))


def _split_inputs(layer: nn.Module, share: float, bits: int | None, largest: Tensor) -> SplitChannels:
    weight: Tensor = output_first(layer, layer.weight)  # type: ignore[arg-type]
    sizes = largest.to(weight).clone()
    index = torch.arange(len(sizes), device=weight.device)
    factor, shift = torch.ones_like(sizes), torch.zeros_like(sizes)
    for _ in range(math.ceil(share * weight.shape[1])):
        channel = int(sizes.argmax())
        half = _step(sizes[channel], bits) / 2
        # x f + s in halves: (x f + s -+ S/2) / 2.
        parts = (factor[channel] / 2).expand(2), (shift[channel] + torch.stack([-half, half])) / 2
        sizes[channel] = sizes[channel] / 2
        factor[channel], shift[channel] = parts[0][0], parts[1][0]
        sizes = torch.cat([sizes, sizes[channel : channel + 1]])
        factor, shift = torch.cat([factor, parts[0][1:]]), torch.cat([shift, parts[1][1:]])
        index = torch.cat([index, index[channel : channel + 1]])
    return SplitChannels(_wider(layer, weight[:, index]), index, _input_axis(layer), factor, shift)


def _wider(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of the layer with another weight, given outputs first."""
    wide: Any = copy.deepcopy(layer)
    given = weight.T if is_conv1d(layer) else weight
    wide.weight = nn.Parameter(given.contiguous(), requires_grad=wide.weight.requires_grad)
    name = "in_channels" if isinstance(layer, nn.modules.conv._ConvNd) else "nx" if is_conv1d(layer) else "in_features"
    setattr(wide, name, weight.shape[1])
    return wide


def channel_bits(
    ranges: Float[Tensor, "channels"], bits: float, *, fewest: int = 2, most: int = 8
) -> Integer[Tensor, "channels"]:
    r"""Bits by channel for the least squared error with a given total of levels (ACIQ, eq. 12).

    :math:`b_i = \log_2 (\alpha_i^{2/3} B / \sum_j \alpha_j^{2/3})`, rounded; :math:`B = n\, 2^b` is how many levels
    n channels of b bits have together.

    Args:
        ranges: alpha, the clipping level of each channel.
        bits: b.
        fewest: at least so many.
        most: at most so many.

    >>> channel_bits(torch.tensor([8.0, 1.0, 1.0, 1.0]), 4).tolist()
    [5, 3, 3, 3]
    """
    check_bits(fewest)
    check_bits(most, least=fewest)
    check_at_least("bits", bits, 1.0)
    shares = ranges.detach().double().abs().clamp(min=1e-30).pow(2 / 3)
    return (shares / shares.mean() * 2.0**bits).log2().round().clamp(fewest, most).long()


@dataclass(frozen=True)
class ChannelBits:
    """Equally spaced levels, more of them for channels with a larger range: ACIQ's bit allocation.

    Args:
        bits: those of equally many levels in every channel; packed files take the widest channel's bits for all.
        symmetric: as of `Uniform`.
        axis: of the channels; 0 for weights, 1 for the activations of a CNN.
        calibration: finds the ranges, at the mean's bits.
        fewest: at least so many.
        most: at most so many.

    >>> weight = torch.tensor([[8.0, -3.0], [1.0, 0.4], [1.0, 0.1], [1.0, -0.2]])
    >>> ChannelBits(4).fit(weight).bits.tolist()
    [5, 3, 3, 3]
    """

    bits: int
    symmetric: bool = True
    axis: int = 0
    calibration: Calibration = MIN_MAX
    fewest: int = 2
    most: int = 8

    @property
    def granularity(self) -> Granularity:
        """One scale for each channel."""
        return PerChannel(self.axis)

    def fit(
        self,
        values: Tensor | Histogram,
        *,
        importance: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> "ChannelBitsQuantizer":
        """The quantizer whose ranges and bits suit ``values``; ``generator`` is not needed."""
        sample = sample_of(values, self.granularity, importance)
        template = Uniform(self.bits, self.symmetric, self.granularity)
        low, high = self.calibration.range(sample, template.bits, self.symmetric, template._fake)
        alpha = torch.maximum(-low, high) if self.symmetric else (high - low) / 2
        bits = channel_bits(alpha, self.bits, fewest=self.fewest, most=self.most)
        return ChannelBitsQuantizer(low, high, bits, self.symmetric, self.granularity)


class ChannelBitsQuantizer(nn.Module):
    """Uniform quantisation with bits of its own for each group; made by `ChannelBits`.

    Args:
        low: of each group's range.
        high: likewise.
        bits: of each group.
        symmetric: whether the levels mirror at zero.
        granularity: the groups.
    """

    bits: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        low: Float[Tensor, "groups"],
        high: Float[Tensor, "groups"],
        bits: Integer[Tensor, "groups"],
        symmetric: bool,
        granularity: Granularity = PER_TENSOR,
    ):
        super().__init__()
        self.symmetric, self.granularity = symmetric, granularity
        highest = torch.exp2(bits.to(high) - 1) - 1 if symmetric else torch.exp2(bits.to(high)) - 1
        scale = torch.maximum(-low, high) / highest if symmetric else (high - low) / highest
        scale = torch.where(scale > 0, scale.clamp(min=TINY), torch.ones_like(scale))
        zero_point = torch.zeros_like(scale) if symmetric else (-low / scale).round()
        self.register_buffer("bits", bits.to(torch.uint8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(torch.uint8))

    def extra_repr(self) -> str:
        """The mean number of bits."""
        return f"{float(self.bits.float().mean()):.3g} bits on average, {self.granularity}"

    @property
    def lowest(self) -> int:
        """The smallest code of the widest group."""
        return 1 - 2 ** (self.code_bits() - 1) if self.symmetric else 0

    def _ends(self) -> tuple[Tensor, Tensor]:
        highest = torch.exp2(self.bits.to(self.scale) - (1 if self.symmetric else 0)) - 1
        return (-highest if self.symmetric else torch.zeros_like(highest)).unsqueeze(1), highest.unsqueeze(1)

    def _levels(self, x: Tensor) -> Tensor:
        return (self.granularity.table(x) / self.scale.unsqueeze(1)).round() + self.zero_point.unsqueeze(1)

    def codes(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Integers, each group's within its own bits."""
        levels = self._levels(x).clamp(*self._ends())
        return self.granularity.restore(levels.to(torch.int8 if self.symmetric else torch.uint8), x.shape)

    def values(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Codes less the zero point, times their scale."""
        table = self.granularity.table(codes.to(self.scale)) - self.zero_point.unsqueeze(1)
        return self.granularity.restore(table * self.scale.unsqueeze(1), codes.shape)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Simulated quantisation; the gradient passes to values inside the range."""
        with torch.no_grad():
            levels = self._levels(x)
            clamped = levels.clamp(*self._ends())
            table = (clamped - self.zero_point.unsqueeze(1)) * self.scale.unsqueeze(1)
            quantised = self.granularity.restore(table, x.shape).to(x.dtype)
            inside = self.granularity.restore(clamped == levels, x.shape)
        return quantised + (x - x.detach()) * inside

    def code_bits(self) -> int:
        """Bits of the widest group's codes."""
        return int(self.bits.max())

    def codes_for(self, count: int) -> int:
        """One code a value."""
        return count

    def overhead_bits(self) -> int:
        """Bits of scales, of each group's number of bits, and of zero points."""
        return len(self.scale) * (32 + 8 + (0 if self.symmetric else 8))


class CorrectedQuantizer(nn.Module):
    r"""Another quantizer's values, corrected for each output channel: :math:`\xi_c (Q(W)_c + \mu_c)`.

    Made by `correct_weights`.
    """

    gain: Tensor
    shift: Tensor

    def __init__(self, quantizer: nn.Module, gain: Float[Tensor, "channels"], shift: Float[Tensor, "channels"]):
        super().__init__()
        self.quantizer = quantizer
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    @property
    def lowest(self) -> int:
        """The inner quantizer's smallest code."""
        return getattr(self.quantizer, "lowest", 0)

    def _corrected(self, values: Tensor) -> Tensor:
        shape = (-1, *[1] * (values.dim() - 1))
        return self.gain.view(shape) * (values + self.shift.view(shape))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Simulated quantisation."""
        return self._corrected(self.quantizer(x))

    def codes(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "..."]:
        """The inner quantizer's codes."""
        return self.quantizer.codes(x)  # type: ignore[operator]

    def values(self, codes: Integer[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The corrected values that codes stand for."""
        return self._corrected(self.quantizer.values(codes))  # type: ignore[operator]

    def code_bits(self) -> int:
        """Bits of one code."""
        return self.quantizer.code_bits()  # type: ignore[operator]

    def codes_for(self, count: int) -> int:
        """How many codes stand for ``count`` values."""
        return self.quantizer.codes_for(count)  # type: ignore[operator]

    def overhead_bits(self) -> int:
        """Bits of what is stored besides codes."""
        return self.quantizer.overhead_bits() + 64 * len(self.gain)  # type: ignore[operator]


@torch.no_grad()
def correct_weights(quantized: nn.Module) -> nn.Module:
    r"""A copy of ``quantized`` whose weights have the float ones' spread and centre in every output channel.

    :math:`W'_c = \xi_c (Q(W)_c + \mu_c)` with :math:`\mu_c = E[W_c] - E[Q(W)_c]` and :math:`\xi_c = \|W_c - E[W_c]\| /
    \|Q(W)_c - E[Q(W)_c]\|` (ACIQ, section 4). Needs no data.

    >>> from etude.compress.quantize import Uniform, quantize
    >>> model = correct_weights(quantize(nn.Sequential(nn.Linear(64, 4)), Uniform(3)))
    >>> torch.allclose(model[0].weight.std(1), model[0].layer.weight.std(1), rtol=1e-4)
    True
    """
    network = copy.deepcopy(quantized)
    layers = quantized_layers(network)
    if not layers:
        raise InputError("has no quantised layer", where="quantized", instead="give what quantize(model, ...) returns")
    for layer in layers.values():
        if isinstance(layer.weight_quantizer, nn.Identity):
            continue
        weight = output_first(layer.layer, layer.master).flatten(1)
        found = layer.weight_quantizer(output_first(layer.layer, layer.master)).flatten(1)
        centre, own = weight.mean(1, keepdim=True), found.mean(1, keepdim=True)
        spread = (found - own).norm(dim=1)
        # A channel that is constant after quantisation has no spread to scale.
        gain = torch.where(spread > 0, (weight - centre).norm(dim=1) / spread.clamp(min=TINY), torch.ones_like(spread))
        layer.weight_quantizer = CorrectedQuantizer(layer.weight_quantizer, gain, (centre - own).squeeze(1))
    return network
