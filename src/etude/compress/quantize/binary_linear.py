"""Products of signs by XNOR and popcount, 64 at a time."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from etude.compress.quantize.layers import QuantizedLayer, SignQuantizer, output_first
from etude.compress.quantize.quantizers import LevelQuantizer
from etude.core.checks import UnsupportedModuleError

__all__ = ["XnorLinear", "pack_signs", "sign_products"]

BLOCK_ELEMENTS = 1 << 22


def pack_signs(x: Float[Tensor, "rows features"]) -> Int64[Tensor, "rows words"]:
    """A bit for each value, 1 where it is not negative, 64 in a word; the last word is filled up with zeros.

    >>> pack_signs(torch.tensor([[1.0, -1.0, 0.0]])).tolist()
    [[5]]
    """
    bits = np.packbits((x >= 0).cpu().numpy(), axis=1, bitorder="little")
    padded = np.zeros((len(bits), -(-bits.shape[1] // 8) * 8), dtype=np.uint8)
    padded[:, : bits.shape[1]] = bits
    return torch.from_numpy(padded.view(np.int64)).to(x.device)


def sign_products(
    left: Int64[Tensor, "rows words"], right: Int64[Tensor, "columns words"], features: int
) -> Int64[Tensor, "rows columns"]:
    r"""The products of two sets of sign vectors: of n signs, n minus twice the number that differ.

    >>> left = pack_signs(torch.tensor([[1.0, -1.0, 1.0]]))
    >>> sign_products(left, pack_signs(torch.tensor([[1.0, 1.0, 1.0], [-1.0, 1.0, -1.0]])), 3).tolist()
    [[1, -3]]
    """
    step = max(BLOCK_ELEMENTS // max(right.numel(), 1), 1)
    return torch.cat([features - 2 * _differences(part, right) for part in left.split(step)])


def _differences(left: Tensor, right: Tensor) -> Tensor:
    if left.device.type == "cpu":
        differ = left.numpy()[:, None, :] ^ right.numpy()
        return torch.from_numpy(np.bitwise_count(differ.view(np.uint64)).sum(-1, dtype=np.int64))
    return _popcount(left.unsqueeze(1) ^ right).sum(-1)


def _popcount(x: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Ones in each word, by sums over ever longer fields."""
    x = x - (x >> 1 & 0x5555555555555555)
    x = (x & 0x3333333333333333) + (x >> 2 & 0x3333333333333333)
    x = x + (x >> 4) & 0x0F0F0F0F0F0F0F0F
    return x * 0x0101010101010101 >> 56 & 0x7F


class XnorLinear(nn.Module):
    r"""A linear layer on signs: :math:`y = \alpha\,\kappa\,(\text{sign}(x) \cdot \text{sign}(W)) + b`.

    Products are XNOR and popcount on packed bits; only the scales, one for each output (alpha) and one for each
    input row (kappa, XNOR-Net's K, with `BinaryInput`), are floats.

    Args:
        layer: a `QuantizedLayer` of a linear layer with `Binary` weights and `Binary` or `BinaryInput` inputs.

    Raises:
        UnsupportedModuleError: for any other.

    >>> from etude.compress.quantize import Binary, BinaryInput, quantize
    >>> model = quantize(nn.Linear(100, 3), Binary(), BinaryInput())
    >>> x = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(XnorLinear(model)(x), model(x), atol=1e-5)
    True
    """

    signs: Tensor
    alpha: Tensor
    kappa: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: nn.Module):
        super().__init__()
        if not (isinstance(layer, QuantizedLayer) and isinstance(layer.layer, nn.Linear)):
            raise UnsupportedModuleError("", layer, "it is no quantised linear layer")
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        fixed = inputs.signs if isinstance(inputs, SignQuantizer) else inputs
        for quantizer in (weights, fixed):
            levels = getattr(quantizer, "levels", None)
            if not isinstance(quantizer, LevelQuantizer) or levels is None or levels.shape[1] != 2:
                raise UnsupportedModuleError(
                    "", layer, "its weights and inputs are not both signs", instead="use Binary() and BinaryInput()"
                )
        assert isinstance(weights, LevelQuantizer)
        assert isinstance(fixed, LevelQuantizer)
        master = output_first(layer.layer, layer.master.detach())
        self.features, self.scaled_by_input = master.shape[1], isinstance(inputs, SignQuantizer)
        alpha = weights.levels[:, 1] * (fixed.levels[0, 1] if len(fixed.levels) == 1 else 1.0)
        if len(alpha) not in (1, len(master)) or len(fixed.levels) != 1:
            raise UnsupportedModuleError("", layer, "its scales are finer than one an output")
        self.register_buffer("signs", pack_signs(master))
        self.register_buffer("alpha", alpha.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch outputs"]:
        """The layer's output."""
        rows = x.reshape(-1, self.features)
        products = sign_products(pack_signs(rows), self.signs, self.features).to(x.dtype) * self.alpha
        if self.scaled_by_input:
            products = products * rows.abs().mean(1, keepdim=True)
        products = products if self.bias is None else products + self.bias
        return products.view(*x.shape[:-1], -1)
