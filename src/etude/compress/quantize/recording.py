"""A quantised model's computation as a graph of its float layers, and the range of every value in it."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from etude.compress.quantize.layers import QuantizedLayer
from etude.compress.quantize.model import Inputs, calls, quantized_layers, replace_modules
from etude.core.checks import InputError

__all__ = ["Recording", "batch_length"]


class Recording:
    """The graph of a quantised model's float layers, and what is known about its values."""

    def __init__(self, model: nn.Module, inputs: Inputs):
        found = quantized_layers(model)
        if not found:
            raise InputError("no layer is quantised", where="model", instead="give the result of quantize()")
        self.layers = found
        network = copy.deepcopy(model).eval()
        copies = quantized_layers(network)
        self.by_weight: dict[int, list[tuple[str, QuantizedLayer]]] = {}
        for path, layer in copies.items():
            self.by_weight.setdefault(id(layer.master), []).append((path, layer))
        simulated = {id(layer.master): layer.weight for layer in copies.values()}
        plain = replace_modules(network, {id(layer): layer.layer for layer in copies.values()})
        self.modules = dict(plain.named_modules(remove_duplicate=False))
        batches = list(calls(inputs))
        if not batches:
            raise InputError("there is no batch", where="inputs", instead="give at least one")
        self.args, self.kwargs = batches[0][0], dict(batches[0][1])
        self.program, self.batch = _export(plain, self.args, self.kwargs)
        self.graph: fx.Graph = self.program.graph
        state = {**dict(plain.named_parameters(remove_duplicate=False)), **dict(plain.named_buffers())}
        self.held, self.values = self._placeholders(state, simulated)
        self.low, self.high = self._ranges(batches)

    def _placeholders(
        self, state: Mapping[str, Tensor], simulated: Mapping[int, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By placeholder: the parameter or constant itself, and its value in simulated quantisation."""
        signature = self.program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        held = {
            placeholder: state[name] if name in state else self.program.constants[name]
            for placeholder, name in names.items()
        }
        for placeholder, name in signature.inputs_to_lifted_tensor_constants.items():
            held[placeholder] = self.program.constants[name]
        return held, {placeholder: simulated.get(id(value), value) for placeholder, value in held.items()}

    def _ranges(self, batches: list[Any]) -> tuple[dict[str, float], dict[str, float]]:
        low: dict[str, float] = {}
        high: dict[str, float] = {}
        placeholders = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        for args, kwargs in batches:
            count = batch_length(args, kwargs)
            if self.batch is not None and count != self.batch:
                continue
            given = iter(pytree.tree_leaves((args, {name: kwargs[name] for name in self.kwargs})))
            placed = [self.values[name] if name in self.values else next(given) for name in placeholders]
            _RangeFinder(self.program.graph_module, low, high).run(*placed)
        return low, high

    def path_of(self, node: fx.Node) -> str:
        """The innermost module the node was recorded in."""
        stack = node.meta.get("nn_module_stack") or {}
        paths = [path for path, _ in stack.values() if path in self.modules]
        return paths[-1] if paths else ""


class _RangeFinder(fx.Interpreter):
    """Notes the smallest and largest value of every float node."""

    def __init__(self, graph: fx.GraphModule, low: dict[str, float], high: dict[str, float]):
        super().__init__(graph)
        self.low, self.high = low, high

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for part in value if isinstance(value, tuple | list) else [value]:
            if isinstance(part, Tensor) and part.is_floating_point() and part.numel():
                self.low[n.name] = min(self.low.get(n.name, math.inf), float(part.min()))
                self.high[n.name] = max(self.high.get(n.name, -math.inf), float(part.max()))
        return value


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int | None]:
    """The recorded program, and the batch size it is bound to, if it is."""
    count = batch_length(args, kwargs)

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: torch.export.Dim.DYNAMIC} if value.dim() and len(value) == count else None
        return None

    dynamic = pytree.tree_map(shape, (args, kwargs))
    shapes = dynamic[1] if kwargs and not args else dynamic[0] if not kwargs else None
    if count > 1 and shapes is not None:
        # A failed attempt leaves marks on the tensors it was given.
        marked = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        try:
            return torch.export.export(model, *marked, dynamic_shapes=shapes, strict=False), None
        except Exception:
            # Some models' code fixes the batch size; they are run in batches of the size recorded.
            pass
    try:
        return torch.export.export(model, args, kwargs, strict=False), count
    except Exception as error:
        raise InputError(
            f"torch.export cannot record its forward: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=f"model {type(model).__name__}",
            instead="give inputs that its forward takes, and a forward whose path does not hang on values",
        ) from error


def batch_length(args: Any, kwargs: Any) -> int:
    """How many examples the arguments of a forward hold."""
    lengths = [len(each) for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.dim()]
    if not lengths:
        raise InputError("holds no batch", where="inputs", instead="give at least one example")
    return lengths[0]
