"""How large a model is, quantised and not, with everything counted: codes, scales, codebooks, and what stays float."""

from dataclasses import dataclass

from torch import Tensor, nn

from etude.compress.quantize.layers import QuantizedLayer, output_first
from etude.compress.quantize.packing import PackedLayer, huffman_bits

__all__ = ["LayerSize", "SizeReport", "size_report"]


@dataclass(frozen=True)
class LayerSize:
    """The size of one layer's weight.

    Args:
        path: of the layer.
        values: numbers in the weight.
        float_bits: as it was.
        code_bits: of its codes.
        overhead_bits: of scales, zero points, levels, codebooks.
        huffman_bits: of its codes under the best prefix code, for Deep Compression.
    """

    path: str
    values: int
    float_bits: int
    code_bits: int
    overhead_bits: int
    huffman_bits: int

    @property
    def bits_per_value(self) -> float:
        """Bits a weight takes, overhead included."""
        return (self.code_bits + self.overhead_bits) / self.values


@dataclass(frozen=True)
class SizeReport:
    """The size of a quantised model.

    Args:
        layers: of the quantised weights, tied ones once.
        other_bits: of all else: biases, normalisation, layers that stay float, ranges of activations.
    """

    layers: tuple[LayerSize, ...]
    other_bits: int

    @property
    def float_bits(self) -> int:
        """Of the float model."""
        return sum(layer.float_bits for layer in self.layers) + self.other_bits

    @property
    def bits(self) -> int:
        """Of the quantised model, everything counted: what its packed file holds but for names and padding."""
        return sum(layer.code_bits + layer.overhead_bits for layer in self.layers) + self.other_bits

    @property
    def ratio(self) -> float:
        """How many times smaller the quantised model is."""
        return self.float_bits / self.bits

    @property
    def bits_per_weight(self) -> float:
        """Mean over the quantised weights, overhead included."""
        total = sum(layer.code_bits + layer.overhead_bits for layer in self.layers)
        return total / max(sum(layer.values for layer in self.layers), 1)

    @property
    def huffman_bits(self) -> int:
        """Of the quantised model with its codes under the best prefix code of each layer."""
        return sum(layer.huffman_bits + layer.overhead_bits for layer in self.layers) + self.other_bits

    def summary(self) -> str:
        """A line for each layer, and one for the whole."""
        lines = [
            f"{layer.path}: {layer.values} weights at {layer.bits_per_value:.3f} bits "
            f"({layer.overhead_bits} bits of overhead)"
            for layer in self.layers
        ]
        whole = f"{self.bits / 8e6:.3f} MB instead of {self.float_bits / 8e6:.3f}: {self.ratio:.2f} times smaller"
        return "\n".join([*lines, f"all else: {self.other_bits} bits", whole])


def size_report(model: nn.Module) -> SizeReport:
    """Count what a model made by `quantize` or `pack` takes, bit by bit.

    >>> import torch
    >>> from etude.compress.quantize import Uniform, quantize
    >>> report = size_report(quantize(nn.Sequential(nn.Linear(64, 64, bias=False)), Uniform(4)))
    >>> report.bits, report.float_bits, round(report.ratio, 2)
    (16416, 131072, 7.98)
    """
    rows, counted = [], set()
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, QuantizedLayer | PackedLayer):
            continue
        source = module.master if isinstance(module, QuantizedLayer) else module.packed_weight
        if isinstance(module, QuantizedLayer):
            if isinstance(module.weight_quantizer, nn.Identity):
                continue
            seen.update(id(each) for each in module.weight_quantizer.buffers())
            seen.update(id(each) for each in module.weight_quantizer.parameters())
            seen.add(id(module.master))
        else:
            seen.update(id(each) for each in module.packed_weight.buffers())
        if id(source) not in counted:
            rows.append(_row(path, module))
        counted.add(id(source))
    rest = [*model.parameters(), *model.buffers()]
    other = sum(8 * each.numel() * each.element_size() for each in rest if id(each) not in seen)
    return SizeReport(tuple(rows), other)


def _row(path: str, module: QuantizedLayer | PackedLayer) -> LayerSize:
    if isinstance(module, QuantizedLayer):
        quantizer, codes, shown = module.weight_quantizer, module.codes(), module.master
    else:
        quantizer, codes, shown = module.packed_weight.quantizer, module.packed_weight.codes(), module.weight
    weight: Tensor = output_first(module.layer, shown)
    return LayerSize(
        path=path,
        values=weight.numel(),
        float_bits=8 * weight.numel() * weight.element_size(),
        code_bits=codes.numel() * _stored_width(quantizer.code_bits()),  # type: ignore[operator]
        overhead_bits=quantizer.overhead_bits(),  # type: ignore[operator]
        huffman_bits=huffman_bits(codes),
    )


def _stored_width(bits: int) -> int:
    return bits if bits <= 8 else 16
