"""Layers that compute with quantised weights and inputs, and the attention layer taken apart into such layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from etude.compress.quantize.quantizers import LevelQuantizer
from etude.core.checks import UnsupportedModuleError

__all__ = [
    "QuantizedLayer",
    "SignQuantizer",
    "SplitAttention",
    "is_conv1d",
    "layer_layout",
    "output_first",
    "run_layer",
    "supported",
]

KINDS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, whose weight is ``(inputs, outputs)``."""
    kind = parametrize.type_before_parametrizations(module)
    return f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D"


def supported(module: nn.Module) -> bool:
    """Whether it is a layer with a weight that is quantised: linear, convolutional or an embedding."""
    return isinstance(module, KINDS) or is_conv1d(module)


def output_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight with its outputs (of an embedding its rows) along the first axis, whatever its own layout.

    >>> output_first(nn.ConvTranspose1d(4, 6, 3, groups=2), torch.zeros(4, 3, 3)).shape
    torch.Size([6, 2, 3])
    """
    if is_conv1d(layer):
        return weight.T
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight


def layer_layout(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight with its outputs first in the layer's own layout: undoes `output_first`."""
    if is_conv1d(layer):
        return weight.T
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight


def run_layer(layer: nn.Module, weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the layer gives with another weight, in its own layout."""
    if isinstance(layer, nn.Linear) and len(args) == 1 and not kwargs:
        return F.linear(args[0], weight, layer.bias)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and len(args) == 1 and not kwargs:
        return layer._conv_forward(args[0], weight, layer.bias)
    if parametrize.is_parametrized(layer, "weight"):
        raise UnsupportedModuleError(
            "", layer, "its weight is computed from others", instead="remove that first (bake_masks for masks)"
        )
    return torch.func.functional_call(layer, {"weight": weight}, args, kwargs)


class QuantizedLayer(nn.Module):
    """A layer whose weight and input are quantised at every call.

    The float weight stays in ``layer`` and is what an optimiser moves: gradients pass the quantizers straight through.

    Args:
        layer: linear, convolutional, an embedding, or GPT-2's ``Conv1D``.
        weight: the `Quantizer` fitted to the weight with its outputs first (`output_first`); kept as
            ``weight_quantizer``.
        input: the quantizer of the layer's first argument, if that is quantised; kept as ``input_quantizer``.

    >>> from etude.compress.quantize import Uniform
    >>> linear = nn.Linear(2, 1, bias=False)
    >>> _ = linear.weight.data.copy_(torch.tensor([[0.75, -0.2]]))
    >>> quantized = QuantizedLayer(linear, Uniform(2).fit(linear.weight))
    >>> quantized(torch.ones(1, 2)).item(), quantized.weight.tolist()
    (0.75, [[0.75, -0.0]])
    """

    def __init__(self, layer: nn.Module, weight: nn.Module, input: nn.Module | None = None):
        super().__init__()
        if not supported(layer):
            raise UnsupportedModuleError("", layer, "it has no weight that is quantised")
        self.layer = layer
        self.weight_quantizer = weight
        self.input_quantizer = input

    @property
    def weight(self) -> Tensor:
        """The quantised weight as floats, in the layer's own layout; differentiable."""
        return layer_layout(self.layer, self.weight_quantizer(output_first(self.layer, self.master)))

    @property
    def master(self) -> Tensor:
        """The float weight, in the layer's own layout."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, which is not quantised."""
        return getattr(self.layer, "bias", None)

    def codes(self) -> Tensor:
        """The weight's codes, outputs first."""
        with torch.no_grad():
            return self.weight_quantizer.codes(output_first(self.layer, self.master))  # type: ignore[operator]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output from its quantised input and weight."""
        if self.input_quantizer is None or not args:
            return run_layer(self.layer, self.weight, args, kwargs)
        output = run_layer(self.layer, self.weight, (self.input_quantizer(args[0]), *args[1:]), kwargs)
        if not isinstance(self.input_quantizer, SignQuantizer):
            return output
        return self.input_quantizer.rescale(output, args[0], self.layer)


class SignQuantizer(nn.Module):
    r"""Signs of a layer's inputs, and the scale map K that XNOR-Net multiplies its output by.

    :math:`x * W \approx (\text{sign}(x) * \text{sign}(W)) \odot K \alpha`: K is the mean magnitude over the channels,
    averaged over each filter's window.

    Args:
        clip: the gradient passes where :math:`|x|` is at most this.
    """

    def __init__(self, clip: float = 1.0):
        super().__init__()
        self.signs = LevelQuantizer(
            torch.tensor([[-1.0, 1.0]]), torch.zeros(1, 1), bits=1, stored=0, clip=torch.tensor([clip])
        )

    def forward(self, x: Tensor) -> Tensor:
        """The signs."""
        return self.signs(x)

    def codes(self, x: Tensor) -> Tensor:
        """0 for negative values, else 1."""
        return self.signs.codes(x)

    def values(self, codes: Tensor) -> Tensor:
        """-1 or 1."""
        return self.signs.values(codes)

    def code_bits(self) -> int:
        """Bits of one code."""
        return 1

    def codes_for(self, count: int) -> int:
        """One code a value."""
        return count

    def overhead_bits(self) -> int:
        """Nothing is stored."""
        return 0

    def rescale(self, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """The layer's output on the signs of ``x``, times K (the bias apart)."""
        bias = getattr(layer, "bias", None)
        if isinstance(layer, nn.modules.conv._ConvNd):
            scale = _window_mean(x, layer)
            bias = bias if bias is None else bias.view(-1, *[1] * (output.dim() - 2))
        else:
            scale = x.abs().mean(-1, keepdim=True)
        return output * scale if bias is None else (output - bias) * scale + bias


def _window_mean(x: Tensor, layer: nn.modules.conv._ConvNd) -> Tensor:
    if layer.transposed:
        raise UnsupportedModuleError("", layer, "XNOR-Net's scale map is not defined for it", instead="use Binary()")
    single = x.abs().mean(1, keepdim=True)
    box = torch.full((1, 1, *layer.kernel_size), 1 / torch.Size(layer.kernel_size).numel()).to(x)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    return convolve(single, box, None, layer.stride, layer.padding, layer.dilation)


class SplitAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with four linear layers of its own, so that each can be quantised.

    Args:
        attention: batch or sequence first, with or without biases, keys and values of other widths.

    Shape:
        as of `torch.nn.MultiheadAttention`.

    >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    >>> split = SplitAttention(attention)
    >>> torch.allclose(split(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
    True
    """

    in_proj_bias = None
    """Keeps torch's transformer layer from its fused path, which would pass the quantizers by."""

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        if attention.bias_k is not None or attention.add_zero_attn:
            raise UnsupportedModuleError(
                "", attention, "it adds a key of its own (add_bias_kv or add_zero_attn)", instead="skip it"
            )
        self.heads, self.dropout, self.batch_first = attention.num_heads, attention.dropout, attention.batch_first
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        parts = [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        self.query, self.key, self.value = parts
        self.output = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output and, if wanted, attention weights."""
        single = query.dim() == 2
        batch_axis = 0 if self.batch_first or single else 1
        if single:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores + _additive(attn_mask, scores, None) + _additive(key_padding_mask, scores, "keys")
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        mixed = self.output((weights @ v).transpose(1, 2).flatten(2))
        shown = None
        if need_weights:
            shown = weights.mean(1) if average_attn_weights else weights
        if single:
            return mixed.squeeze(0), None if shown is None else shown.squeeze(0)
        return mixed if batch_axis == 0 else mixed.transpose(0, 1), shown


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer


def _additive(mask: Tensor | None, scores: Tensor, of: str | None) -> Tensor | float:
    """A mask as something to add to scores (batch, heads, queries, keys)."""
    if mask is None:
        return 0.0
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf)
    if of == "keys":
        return mask.view(scores.shape[0], 1, 1, -1)
    return mask if mask.dim() == 2 else mask.view(scores.shape[0], -1, *mask.shape[-2:])
