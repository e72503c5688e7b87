r"""Quantisation-aware training: what to add to your own loop around a model made by `quantize`.

The model already trains as it is: quantised forward, gradients straight through to float weights. Here are ranges that
follow the weights (`Moving`), gradual quantisation (`Partial`), and what is done late in training
(`freeze_batch_norm`) or after it (`freeze_quantizers`). Schemes whose ranges are learned are in
`etude.compress.quantize.learned`, regularisers and proximal steps in `etude.compress.quantize.regularisation`.
Score-function estimators, target propagation and combinatorial search, which the survey also names, are not here.
"""

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from etude.compress.quantize.granularity import PER_TENSOR, Granularity
from etude.compress.quantize.histogram import Histogram
from etude.compress.quantize.layers import QuantizedLayer, layer_layout, output_first
from etude.compress.quantize.model import quantized_layers, replace_modules
from etude.compress.quantize.schemes import Scheme, Uniform, sample_of
from etude.core.checks import InputError, UnsupportedModuleError, check_at_least, check_fraction, check_one_of

__all__ = [
    "FrozenBatchNorm",
    "Moving",
    "MovingQuantizer",
    "Partial",
    "PartialQuantizer",
    "clip_latent_weights",
    "follow_curvature",
    "freeze_batch_norm",
    "freeze_quantizers",
    "set_share",
]


@dataclass(frozen=True)
class Moving:
    """A scheme fitted again at every training step, so that ranges and levels follow what they quantise.

    With any scheme of fixed ranges: `Uniform` weights whose range moves with them, activations whose range is a moving
    average of the batches' (Jacob et al., 2018), `Binary` for BWN and BinaryConnect, `Ternary` for TWN, `LloydMax` for
    weight sharing, `BinaryCode` for LQ-Nets. In evaluation mode the last fit stays.

    Args:
        scheme: what to fit.
        momentum: weight of the newest range; 1 forgets the ones before. Below 1 for `Uniform` only.

    >>> quantizer = Moving(Uniform(4)).fit(torch.tensor([7.0]))
    >>> _ = quantizer(torch.tensor([14.0]))
    >>> quantizer.quantizer.scale.item(), quantizer.eval()(torch.tensor([70.0])).item()
    (2.0, 14.0)
    """

    scheme: Scheme
    momentum: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum, one=True)
        if self.momentum < 1 and not isinstance(self.scheme, Uniform):
            raise InputError(
                f"got {self.momentum} for {type(self.scheme).__name__}", where="momentum", instead="give 1"
            )

    @property
    def granularity(self) -> Granularity:
        """Which values share a range."""
        return getattr(self.scheme, "granularity", PER_TENSOR)

    def fit(
        self,
        values: Tensor | Histogram,
        *,
        importance: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> "MovingQuantizer":
        """The quantizer that starts from ``values``."""
        return MovingQuantizer(self, values, importance, generator)


class _Wrapped(nn.Module):
    """A quantizer around another, which tells what codes are."""

    quantizer: nn.Module

    @property
    def lowest(self) -> int:
        """The inner quantizer's smallest code."""
        return getattr(self.quantizer, "lowest", 0)

    def codes(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "..."]:
        """The inner quantizer's codes."""
        return self.quantizer.codes(x)  # type: ignore[operator]

    def values(self, codes: Integer[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What codes stand for."""
        return self.quantizer.values(codes)  # type: ignore[operator]

    def code_bits(self) -> int:
        """Bits of one code."""
        return self.quantizer.code_bits()  # type: ignore[operator]

    def codes_for(self, count: int) -> int:
        """How many codes stand for ``count`` values."""
        return self.quantizer.codes_for(count)  # type: ignore[operator]

    def overhead_bits(self) -> int:
        """Bits of what is stored besides codes."""
        return self.quantizer.overhead_bits()  # type: ignore[operator]

    def plain(self) -> nn.Module:
        """The inner quantizer as it is now."""
        return plain(self.quantizer)


class MovingQuantizer(_Wrapped):
    """Fits its scheme to every training batch; made by `Moving`.

    Attributes:
        quantizer: the last fit.
        importance: weight of each value in the fits; `follow_curvature` keeps it at the optimizer's curvature.
    """

    importance: Tensor | None
    low: Tensor | None
    high: Tensor | None

    def __init__(
        self,
        moving: Moving,
        values: Tensor | Histogram,
        importance: Tensor | None,
        generator: torch.Generator | None,
    ):
        super().__init__()
        self.scheme, self.momentum, self.generator = moving.scheme, moving.momentum, generator
        self.quantizer = moving.scheme.fit(values, importance=importance, generator=generator)
        low = high = None
        if self.momentum < 1:
            low, high = self._range(values)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("importance", importance)

    def _range(self, values: Tensor | Histogram) -> tuple[Tensor, Tensor]:
        scheme = self.scheme
        assert isinstance(scheme, Uniform)
        sample = sample_of(values, scheme.granularity)
        return scheme.calibration.range(sample, scheme.bits, scheme.symmetric, scheme._fake)

    def extra_repr(self) -> str:
        """The scheme and the momentum."""
        return f"{self.scheme}, momentum={self.momentum}"

    @torch.no_grad()
    def refit(self, x: Tensor) -> None:
        """Fit to ``x``."""
        if self.momentum < 1:
            assert self.low is not None
            assert self.high is not None
            assert isinstance(self.scheme, Uniform)
            low, high = self._range(x)
            self.low.lerp_(low.to(self.low), self.momentum)
            self.high.lerp_(high.to(self.high), self.momentum)
            fresh: nn.Module = self.scheme.between(self.low, self.high, generator=self.generator)
        else:
            fresh = self.scheme.fit(x, importance=self.importance, generator=self.generator)
        for held, found in zip(self.quantizer.buffers(), fresh.buffers(), strict=True):
            held.copy_(found)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Simulated quantisation, in training mode after a fresh fit."""
        if self.training:
            self.refit(x.detach())
        return self.quantizer(x)


@dataclass(frozen=True)
class Partial:
    r"""A part of the quantisation, to be raised in training with `set_share`.

    Args:
        scheme: any scheme.
        how: ``blend``, the affine combination :math:`(1 - a) w + a\, Q(w)`; ``subset``, a random subset of the values
            quantised at every training step, the others in floats with exact gradients (QuantNoise: Fan et al., 2021,
            whose rate is the share). In evaluation all is quantised in the latter.
        share: a, or the rate, at first.
        block: neighbouring values of the subset that are drawn together; QuantNoise takes 1 for uniform and the
            codebook's ``dim`` for vector quantisation.

    >>> quantizer = Partial(Uniform(2), share=0.5).fit(torch.tensor([1.0]))
    >>> quantizer(torch.tensor([0.8])).item()
    0.8999...
    """

    scheme: Scheme
    how: str = "blend"
    share: float = 0.0
    block: int = 1

    def __post_init__(self) -> None:
        check_one_of("how", self.how, ("blend", "subset"))
        check_fraction("share", self.share, zero=True, one=True)
        check_at_least("block", self.block, 1)

    @property
    def granularity(self) -> Granularity:
        """Which values share a range."""
        return getattr(self.scheme, "granularity", PER_TENSOR)

    def fit(
        self,
        values: Tensor | Histogram,
        *,
        importance: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> "PartialQuantizer":
        """The quantizer that starts from ``values``; ``generator`` also draws the subsets."""
        inner = self.scheme.fit(values, importance=importance, generator=generator)
        return PartialQuantizer(inner, self.how, self.share, self.block, generator)


class PartialQuantizer(_Wrapped):
    """Applies another quantizer in part; made by `Partial`. Its ``share`` is a buffer."""

    share: Tensor

    def __init__(
        self, quantizer: nn.Module, how: str, share: float, block: int, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.quantizer, self.how, self.block, self.generator = quantizer, how, block, generator
        self.register_buffer("share", torch.tensor(share))

    def extra_repr(self) -> str:
        """How, and how much."""
        return f"how={self.how!r}, share={float(self.share):.3g}"

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Values quantised in part."""
        if self.how == "blend":
            # Either end exactly: a sum of products would round.
            return x.lerp(self.quantizer(x), self.share.to(x.dtype))
        if not self.training:
            return self.quantizer(x)
        blocks = math.ceil(x.numel() / self.block)
        drawn = torch.rand(blocks, generator=self.generator, device=x.device) < self.share
        chosen = drawn.repeat_interleave(self.block)[: x.numel()].view(x.shape)
        return torch.where(chosen, self.quantizer(x), x)


def set_share(model: nn.Module, share: float) -> None:
    """Set the share that every `Partial` quantizer of a model applies, e.g. to step / steps.

    >>> from etude.compress.quantize import quantize
    >>> model = quantize(nn.Sequential(nn.Linear(2, 2)), Partial(Uniform(2)))
    >>> set_share(model, 0.25)
    >>> model[0].weight_quantizer.share.item()
    0.25
    """
    check_fraction("share", share, zero=True, one=True)
    found = [module for module in model.modules() if isinstance(module, PartialQuantizer)]
    if not found:
        raise InputError("has no partial quantizer", where="model", instead="quantize it with Partial(scheme)")
    for module in found:
        module.share.fill_(share)


@torch.no_grad()
def clip_latent_weights(model: nn.Module, bound: float = 1.0) -> None:
    """Clip the float weights behind quantised ones, as BinaryConnect does after every step.

    Beyond the levels they have no effect, and would take ever longer to come back.

    >>> from etude.compress.quantize import Binary, quantize
    >>> model = quantize(nn.Sequential(nn.Linear(2, 1)), Binary(scaled=False))
    >>> _ = model[0].layer.weight.data.fill_(3.0)
    >>> clip_latent_weights(model)
    >>> model[0].layer.weight.max().item()
    1.0
    """
    check_at_least("bound", bound, 0.0, strict=True)
    for layer in layers_in(model).values():
        layer.master.clamp_(-bound, bound)


@torch.no_grad()
def follow_curvature(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    r"""Weight the next fits of `Moving` quantizers by Adam's second moments: loss-aware binarisation and ternarisation.

    With the diagonal curvature :math:`d = \sqrt{v}` the proximal Newton step's scale is
    :math:`\alpha = \|d \odot w\|_1 / \|d\|_1`. Call it after each ``optimizer.step()``.

    Args:
        model: made by `quantize` with `Moving` weights.
        optimizer: one that keeps ``exp_avg_sq`` for each weight, as Adam does.

    Hou, Yao and Kwok, Loss-aware Binarization of Deep Networks, ICLR 2017; Hou and Kwok, Loss-aware Weight
    Quantization of Deep Networks, ICLR 2018.
    """
    moving = {
        path: (layer, layer.weight_quantizer)
        for path, layer in layers_in(model).items()
        if isinstance(layer.weight_quantizer, MovingQuantizer)
    }
    if not moving:
        raise InputError("has no weights with a moving scheme", where="model", instead="use Moving(Binary())")
    for path, (layer, quantizer) in moving.items():
        held = optimizer.state.get(layer.master, {}).get("exp_avg_sq")
        if held is None:
            raise InputError(
                "the optimizer keeps no second moment of its weight",
                where=f"layer {path!r}",
                instead="use Adam and call this after its first step",
            )
        # Where no gradient ever came, e.g. in dead units, all weights count alike.
        curvature = output_first(layer.layer, held).sqrt()
        quantizer.importance = curvature if bool(curvature.any()) else torch.ones_like(curvature)


class FrozenBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm that always uses its running statistics, in training mode too; made by `freeze_batch_norm`."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        """Stay in evaluation mode."""
        return super().train(False)

    def _check_input_dim(self, input: Tensor) -> None:
        return


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Make every batch norm of ``model`` keep its running statistics from now on; changes and returns the model.

    Late in quantisation-aware training batch statistics jump with the rounding; freezing them for the last part makes
    training see what inference will compute (Krishnamoorthi, 2018). Parameters stay the same objects.

    >>> model = freeze_batch_norm(nn.Sequential(nn.BatchNorm1d(2))).train()
    >>> _ = model(torch.randn(5, 2))
    >>> model[0].running_mean.tolist(), list(model.state_dict())[:2]
    ([0.0, 0.0], ['0.weight', '0.bias'])
    """
    replaced: dict[int, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, FrozenBatchNorm):
            if module.running_mean is None:
                raise UnsupportedModuleError(path, module, "it keeps no running statistics", instead="track them")
            frozen = FrozenBatchNorm(module.num_features, module.eps, module.momentum, module.affine, device="meta")
            frozen._parameters, frozen._buffers = module._parameters, module._buffers
            replaced[id(module)] = frozen.train()
    if not replaced:
        raise InputError("has no batch norm to freeze", where="model", instead="leave it as it is")
    return replace_modules(model, replaced)


def freeze_quantizers(model: nn.Module) -> nn.Module:
    """A copy of a trained model with plain quantizers at what training learned, ready to be packed or made integer.

    The float weights behind are set to their quantised values, where those are levels; the function is unchanged.

    >>> from etude.compress.quantize import LearnedStep, quantize
    >>> model = quantize(nn.Sequential(nn.Linear(4, 2)), LearnedStep(4))
    >>> frozen = freeze_quantizers(model)
    >>> torch.allclose(frozen(torch.ones(1, 4)), model(torch.ones(1, 4)), atol=1e-6)
    True
    >>> type(frozen[0].weight_quantizer).__name__
    'UniformQuantizer'
    """
    network = copy.deepcopy(model)
    for layer in layers_in(network).values():
        layer.eval()
        with torch.no_grad():
            represented = layer.weight_quantizer(output_first(layer.layer, layer.master))
            layer.weight_quantizer = plain(layer.weight_quantizer).to(layer.master.device)
            if torch.allclose(layer.weight_quantizer(represented), represented, rtol=1e-5, atol=0):
                layer.master.copy_(layer_layout(layer.layer, represented))
        if layer.input_quantizer is not None:
            layer.input_quantizer = plain(layer.input_quantizer).to(layer.master.device)
    return network.train(model.training)


def plain(quantizer: nn.Module) -> nn.Module:
    """The quantizer without what only training needs; those of fixed schemes themselves."""
    return quantizer.plain() if hasattr(quantizer, "plain") else quantizer  # type: ignore[operator]


def layers_in(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantised layers of a model, of which there must be some."""
    found = quantized_layers(model)
    if not found:
        raise InputError("has no quantised layer", where="model", instead="give what quantize(model, ...) returns")
    return found
