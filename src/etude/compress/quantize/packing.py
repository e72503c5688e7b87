"""Packing: codes in as few bits as they need, in the model's own ``state_dict``.

Codes of 1 to 8 bits, odd widths too, lie side by side in bytes: eight codes of b bits fill b bytes exactly.
"""

import copy
import heapq
import math
from typing import Any

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor, nn

from etude.compress.quantize.layers import QuantizedLayer, layer_layout, run_layer
from etude.compress.quantize.model import quantized_layers, replace_modules
from etude.core.checks import InputError, UnsupportedModuleError

__all__ = ["PackedLayer", "PackedWeight", "dequantize", "huffman_bits", "pack", "pack_codes", "unpack_codes"]


def pack_codes(codes: Integer[Tensor, "..."], bits: int, lowest: int = 0) -> UInt8[Tensor, "bytes"]:
    """Integers as a string of bits: code i lies in bits ``i * bits`` to ``(i + 1) * bits - 1``, low bits first.

    Args:
        codes: integers from ``lowest`` to ``lowest + 2 ** bits - 1``.
        bits: 1 to 8, or 16.
        lowest: taken off every code first.

    Returns:
        ``ceil(count * bits / 8)`` bytes.

    Raises:
        InputError: for a code out of range.

    >>> pack_codes(torch.tensor([1, 2, 3, -4]), 3, lowest=-4).tolist()
    [245, 1]
    """
    _check_width(bits)
    flat = codes.reshape(-1).long() - lowest
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise InputError(
            f"got {int(flat.min()) + lowest} to {int(flat.max()) + lowest}",
            where="codes",
            instead=f"give integers from {lowest} to {lowest + 2**bits - 1}",
        )
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    per_word = 8 if bits <= 7 else 4  # a word of 63 bits holds them
    words = _joined(padded.view(-1, per_word), bits)
    places = torch.arange(0, bits * per_word, 8, device=flat.device)
    return (words.unsqueeze(1) >> places & 255).to(torch.uint8).flatten()[: _bytes(len(flat), bits)]


def unpack_codes(packed: UInt8[Tensor, "bytes"], count: int, bits: int, lowest: int = 0) -> Integer[Tensor, "count"]:
    """The first ``count`` codes of `pack_codes`.

    >>> unpack_codes(torch.tensor([245, 1], dtype=torch.uint8), 4, 3, lowest=-4).tolist()
    [1, 2, 3, -4]
    """
    _check_width(bits)
    if len(packed) != _bytes(count, bits):
        raise InputError(
            f"got {len(packed)} for {count} codes of {bits} bits",
            where="bytes",
            instead=f"give {_bytes(count, bits)}",
        )
    if bits == 8:
        return packed.int() + lowest
    per_word = 8 if bits <= 7 else 4
    width = per_word * bits // 8
    padded = torch.cat([packed, packed.new_zeros(-len(packed) % width)])
    words = _joined(padded.view(-1, width).long(), 8)
    places = torch.arange(0, bits * per_word, bits, device=packed.device)
    return (words.unsqueeze(1) >> places & 2**bits - 1).int().flatten()[:count] + lowest


def _joined(parts: Integer[Tensor, "words parts"], bits: int) -> Integer[Tensor, "words"]:
    return (parts << bits * torch.arange(parts.shape[1], device=parts.device)).sum(1)


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _check_width(bits: int) -> None:
    if bits not in (*range(1, 9), 16):
        raise InputError(f"got {bits}", where="bits", instead="give 1 to 8, or 16")


class PackedWeight(nn.Module):
    """A weight as packed codes and what gives their values; called, the weight as floats, outputs first.

    Args:
        codes: of the weight.
        quantizer: that made them; a copy is kept without what only encoding needs.

    >>> from etude.compress.quantize import Uniform
    >>> weight = torch.tensor([[0.5, -1.0, 0.0]])
    >>> quantizer = Uniform(2).fit(weight)
    >>> packed = PackedWeight(quantizer.codes(weight), quantizer)
    >>> packed.packed.numel(), packed().tolist()
    (1, [[0.0, -1.0, 0.0]])
    """

    packed: Tensor

    def __init__(self, codes: Integer[Tensor, "..."], quantizer: Any):
        super().__init__()
        self.quantizer = copy.deepcopy(quantizer)
        for name in getattr(quantizer, "encoding", ()):
            setattr(self.quantizer, name, None)
        # Codes of 9 to 16 bits take two bytes.
        bits = quantizer.code_bits()
        self.bits, self.lowest = bits if bits <= 8 else 16, getattr(quantizer, "lowest", 0)
        self.shape = tuple(codes.shape)
        self.register_buffer("packed", pack_codes(codes, self.bits, self.lowest))

    def extra_repr(self) -> str:
        """The codes' shape and width."""
        return f"{self.shape} codes of {self.bits} bits"

    def codes(self) -> Integer[Tensor, "..."]:
        """The codes."""
        return unpack_codes(self.packed, math.prod(self.shape), self.bits, self.lowest).view(self.shape)

    def forward(self) -> Tensor:
        """The weight, outputs first."""
        return self.quantizer.values(self.codes())


class PackedLayer(nn.Module):
    """A layer that keeps its weight packed and unpacks it at every call; made by `pack`.

    Args:
        layer: the layer; its own weight is dropped.
        weight: in its place.
        input: the quantizer of the layer's first argument, if there is one.
    """

    def __init__(self, layer: nn.Module, weight: PackedWeight, input: nn.Module | None = None):
        super().__init__()
        self.layer = copy.copy(layer)
        self.layer._parameters = {**layer._parameters, "weight": None}
        self.packed_weight = weight
        self.input_quantizer = input

    @property
    def weight(self) -> Tensor:
        """The weight as floats, in the layer's own layout."""
        return layer_layout(self.layer, self.packed_weight())

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        return getattr(self.layer, "bias", None)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of the `QuantizedLayer` it was made from."""
        if self.input_quantizer is None or not args:
            return run_layer(self.layer, self.weight, args, kwargs)
        output = run_layer(self.layer, self.weight, (self.input_quantizer(args[0]), *args[1:]), kwargs)
        rescale = getattr(self.input_quantizer, "rescale", None)
        return output if rescale is None else rescale(output, args[0], self.layer)


def pack(model: nn.Module) -> nn.Module:
    """A copy of a model made by `quantize` that holds, and saves, its weights as packed codes.

    It computes the same, bit for bit, and cannot be trained. Its ``state_dict`` loads into any model packed from the
    same architecture and schemes. Tied weights are packed once; save those with `safetensors.torch.save_model`.

    Raises:
        InputError: if no layer is quantised.

    >>> from etude.compress.quantize import Uniform, quantize
    >>> packed = pack(quantize(nn.Sequential(nn.Linear(64, 64, bias=False)), Uniform(3)))
    >>> {name: value.numel() * value.element_size() for name, value in packed.state_dict().items()}
    {'0.packed_weight.packed': 1536, '0.packed_weight.quantizer.scale': 4}
    """
    network = copy.deepcopy(model)
    found = quantized_layers(network)
    if not found:
        raise InputError("no layer is quantised", where="model", instead="give the result of quantize()")
    shared: dict[int, tuple[QuantizedLayer, PackedWeight]] = {}
    replaced: dict[int, nn.Module] = {}
    for path, layer in found.items():
        if isinstance(layer.weight_quantizer, nn.Identity):
            continue
        if not hasattr(layer.weight_quantizer, "codes"):
            raise UnsupportedModuleError(path, layer.weight_quantizer, "it gives no codes")
        first = shared.get(id(layer.master))
        weight = first[1] if first is not None and _alike(first[0], layer) else _packed(layer)
        shared.setdefault(id(layer.master), (layer, weight))
        packed = PackedLayer(layer.layer, weight, layer.input_quantizer)
        replaced[id(layer)] = packed.train(layer.training)
    return replace_modules(network, replaced)


def _packed(layer: QuantizedLayer) -> PackedWeight:
    return PackedWeight(layer.codes(), layer.weight_quantizer)


def _alike(one: QuantizedLayer, other: QuantizedLayer) -> bool:
    """Whether two layers of one weight quantise it alike."""
    return torch.equal(one.weight, other.weight) and torch.equal(one.codes(), other.codes())


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """A copy with plain layers whose weights are the quantised values; activations are no longer quantised.

    >>> from etude.compress.quantize import Uniform, quantize
    >>> plain = dequantize(quantize(nn.Sequential(nn.Linear(4, 2)), Uniform(2)))
    >>> type(plain[0]).__name__, len(plain[0].weight.abs().unique()) <= 2
    ('Linear', True)
    """
    network = copy.deepcopy(model)
    replaced: dict[int, nn.Module] = {}
    values: dict[int, nn.Parameter] = {}
    for module in list(network.modules()):
        if isinstance(module, QuantizedLayer | PackedLayer):
            weight = nn.Parameter(module.weight.detach().clone())
            key = id(module.master if isinstance(module, QuantizedLayer) else module.packed_weight)
            # Tied weights stay tied.
            known = values.get(key)
            kept = known if known is not None and torch.equal(known, weight) else weight
            values.setdefault(key, kept)
            module.layer._parameters["weight"] = kept
            replaced[id(module)] = module.layer
    return replace_modules(network, replaced)


def huffman_bits(codes: Integer[Tensor, "..."]) -> int:
    """Bits of the codes under their best prefix code (Huffman), without its table: Deep Compression's last step.

    >>> huffman_bits(torch.tensor([0, 0, 0, 0, 1, 1, 2, 3]))
    14
    """
    counts = torch.unique(codes, return_counts=True)[1].tolist()
    if len(counts) == 1:
        return int(counts[0])
    heapq.heapify(counts)
    total = 0
    while len(counts) > 1:
        # Each merge puts one bit before every code below it.
        merged = heapq.heappop(counts) + heapq.heappop(counts)
        total += merged
        heapq.heappush(counts, merged)
    return total
