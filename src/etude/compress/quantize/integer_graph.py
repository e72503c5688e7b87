"""The graph that `to_integer` builds: where carriers come from, and what their grids are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from etude.compress.quantize.integer_layers import CARRIER_BITS, Grid, IntegerParameter, QuantiseInput, Rescale
from etude.compress.quantize.layers import QuantizedLayer
from etude.compress.quantize.quantizers import UniformQuantizer
from etude.compress.quantize.recording import Recording
from etude.core.checks import UnsupportedModuleError

__all__ = ["MOVES", "POINTWISE", "Builder", "arguments", "operation", "zero_point"]

POINTWISE = {"dropout", "clone", "contiguous", "alias", "detach", "to", "lift_fresh_copy"}
"""Operations that leave every value where it is, and as it is."""
MOVES = {
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "mT", "flatten", "unflatten", "unsqueeze"),
    *("squeeze", "slice", "select", "expand", "expand_as", "repeat", "split", "split_with_sizes", "chunk", "getitem"),
    *("index", "index_select", "gather", "roll", "flip", "narrow", "unbind", "movedim", "swapaxes"),
}
"""Operations that only move values about."""
LAYERS = {
    *("linear", "addmm", "embedding", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
"""Operations of layers with weights."""


def operation(node: fx.Node) -> str:
    """An operation's name, without what tells its variants apart."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).rstrip("_")


def arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """A node's arguments by name."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def zero_point(quantizer: UniformQuantizer) -> int:
    """The one zero point of a quantizer."""
    return 0 if quantizer.zero_point is None else int(quantizer.zero_point)


class Builder:
    """An integer graph in the making.

    A value on a grid is a *carrier*; values that do not hang on activations (indices, masks, sizes) stay as they are.

    Args:
        recorded: the model.
    """

    def __init__(self, recorded: Recording):
        self.recorded = recorded
        self.root, self.graph = nn.Module(), fx.Graph()
        self.made: dict[Any, fx.Node] = {}
        self.grids: dict[Any, Grid] = {}

    def is_carrier(self, node: fx.Node) -> bool:
        """Whether the value is an activation, or a parameter that may meet one."""
        if node in self.grids:
            return True
        value = self.recorded.held.get(node.name)
        return value is not None and value.is_floating_point() and node.op == "placeholder"

    def refuse(self, node: fx.Node, why: str, instead: str | None = None) -> UnsupportedModuleError:
        """The error that names the module a node was recorded in."""
        path = self.recorded.path_of(node)
        return UnsupportedModuleError(path, self.recorded.modules[path], why, instead=instead)

    # Nodes of the new graph

    def call(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        """Add a module, and a call of it."""
        unique = name
        while hasattr(self.root, unique):
            unique += "_"
        self.root.add_module(unique, module)
        return self.graph.call_module(unique, args)

    def place(self, node: fx.Node, module: nn.Module, args: tuple[Any, ...], grid: Grid) -> None:
        """Let a module on carriers stand for a node."""
        self.made[node], self.grids[node] = self.call(node.name, module, args), grid

    def placeholder(self, node: fx.Node) -> None:
        """An input of the model, quantised if it is of floats; of a parameter's placeholder nothing as yet."""
        if node.name in self.recorded.held:
            if not self.is_carrier(node) and node.users:
                self.constant(node)
            return
        made = self.graph.placeholder(node.name)
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            self.made[node] = made
            return
        quantizer = self.awaited(node)
        if quantizer is None:
            scale = self.carrier_scale(node)
            self.place(node, QuantiseInput(scale, -(2**30), 2**30), (made,), Grid.single(scale))
        else:
            zero = zero_point(quantizer)
            module = QuantiseInput(float(quantizer.scale), quantizer.lowest - zero, quantizer.highest - zero)
            self.place(node, module, (made,), Grid(quantizer.scale.double().reshape(())))

    def constant(self, node: fx.Node) -> None:
        """A parameter, buffer or constant as it is."""
        self.root.register_buffer(node.name, self.recorded.held[node.name].detach())
        self.made[node] = self.graph.get_attr(node.name)

    def copy(self, node: fx.Node) -> None:
        """An operation as it is."""
        for each in node.all_input_nodes:
            if each not in self.made and each.name in self.recorded.held:
                self.constant(each)
        self.made[node] = self.graph.node_copy(node, lambda each: self.made[each])

    # Carriers

    def carrier(self, node: Any) -> tuple[fx.Node, Grid]:
        """The carrier of a node; a parameter becomes one when it is first needed."""
        if node not in self.grids:
            value = self.recorded.held[node.name]
            if not bool(torch.isfinite(value).all()):
                raise self.refuse(node, f"its constant {node.name!r} is not finite")
            scale = self.carrier_scale(node)
            self.place(node, IntegerParameter(value, scale), (), Grid.single(scale))
        return self.made[node], self.grids[node]

    def largest(self, node: Any) -> float:
        """The largest magnitude of a value in calibration; 1 for one that is zero."""
        if node.name in self.recorded.values and node.name not in self.recorded.low:
            return float(self.recorded.values[node.name].abs().max()) or 1.0
        return max(-self.recorded.low.get(node.name, 0.0), self.recorded.high.get(node.name, 0.0)) or 1.0

    def carrier_scale(self, node: fx.Node) -> float:
        """The scale of a value's carriers: that of the codes they become next, or a fine one."""
        awaited = self.awaited(node)
        return self.largest(node) / 2**CARRIER_BITS if awaited is None else float(awaited.scale)

    def awaited(self, node: fx.Node) -> UniformQuantizer | None:
        """The input quantizer of the layers that a value goes to, where it goes to nothing else."""
        found: list[UniformQuantizer] = []
        ahead = list(node.users)
        while ahead:
            user = ahead.pop()
            if operation(user) in POINTWISE | MOVES | {"relu", "max_pool2d"}:
                ahead.extend(user.users)
                continue
            layer = self.layer_of(user)
            if layer is None or not isinstance(layer[1].input_quantizer, UniformQuantizer):
                return None
            found.append(layer[1].input_quantizer)
        same = all(torch.equal(each.scale, found[0].scale) for each in found)
        return found[0] if found and same and found[0].scale.numel() == 1 else None

    def single(self, node: Any, bits: int | None = None) -> tuple[fx.Node, Grid]:
        """A carrier with one scale, and if ``bits`` is given with no more of them."""
        made, grid = self.carrier(node)
        fits = bits is None or self.largest(node) <= float(grid.scale.min()) * 2**bits
        if grid.scale.dim() == 0 and fits:
            return made, grid
        scale = self.carrier_scale(node)
        if bits is not None:
            scale = max(scale, self.largest(node) / 2**bits)
        return self.call(f"{node.name}_grid", Rescale(grid, scale), (made,)), Grid.single(scale)

    def to(self, node: Any, scale: float) -> tuple[fx.Node, Rescale]:
        """A carrier, and what brings it to another grid."""
        made, grid = self.carrier(node)
        return made, Rescale(grid, scale)

    def codes(self, node: Any) -> tuple[fx.Node, Rescale, float]:
        """A carrier, and what makes calibrated 8-bit codes of it: unsigned for values that are never negative."""
        made, grid = self.carrier(node)
        unsigned = self.recorded.low.get(node.name, -1.0) >= 0
        highest = 255 if unsigned else 127
        scale = self.largest(node) / highest
        return made, Rescale(grid, scale, 0 if unsigned else -127, highest), scale

    def layer_of(self, node: fx.Node) -> tuple[str, QuantizedLayer] | None:
        """The quantised layer whose weight a node uses, and its path."""
        name = operation(node)
        if name not in LAYERS:
            return None
        weight = node.args[{"embedding": 0, "addmm": 2}.get(name, 1)]
        value = self.recorded.held.get(getattr(weight, "name", ""))
        # Of tied weights' layers the one of this kind, and at this place.
        found = [
            each
            for each in self.recorded.by_weight.get(id(value), [])
            if isinstance(each[1].layer, nn.Embedding) == (name == "embedding")
        ]
        path = self.recorded.path_of(node)
        return next((each for each in found if each[0] == path), found[0] if found else None)
