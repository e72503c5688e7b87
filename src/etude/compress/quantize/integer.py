"""`to_integer`: a model that computes in integers from its inputs to its outputs."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from etude.compress.quantize.integer_graph import MOVES, POINTWISE, Builder, operation
from etude.compress.quantize.integer_layers import Dequantise
from etude.compress.quantize.integer_operations import OPERATIONS, move
from etude.compress.quantize.model import Inputs
from etude.compress.quantize.recording import Recording, batch_length
from etude.core.checks import InputError

__all__ = ["IntegerModel", "to_integer"]


@torch.no_grad()
def to_integer(model: nn.Module, inputs: Inputs) -> "IntegerModel":
    """A copy of a quantised model that computes with integers only, from the codes of its inputs to its outputs.

    Weights and inputs of layers are 8-bit codes, products are summed in 32 bits, biases are 32-bit integers at the
    sums' scale, changes of scale are an integer product and a shift (Jacob et al., 2018; HAWQ-V3: Yao et al., 2021).
    Batch norm goes into the scale and bias of the layer before it, exactly. Residual sums, softmax, GELU, tanh, layer
    norm and products of activations run on integers, too (I-BERT: Kim et al., 2021); their grids are calibrated on
    ``inputs``. Floats occur where the input is quantised and where the output is given back.

    Args:
        model: made by `quantize` with `Uniform` schemes of at most 8 bits: weights symmetric, with one scale a tensor
            or channel, activations static with one scale a tensor.
        inputs: a batch or batches, as of `quantize`; the first serves to record the model.

    Returns:
        A module with the model's signature in evaluation mode. It takes any batch size, in batches as recorded where
        the model's own code hangs on that.

    Raises:
        InputError: if the model cannot be recorded by `torch.export`.
        UnsupportedModuleError: for a layer quantised otherwise or not at all, and for any operation without an integer
            form; it names the module.

    >>> from etude.compress.quantize import PerChannel, Uniform, quantize
    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> quantized = quantize(model, Uniform(8, granularity=PerChannel()), Uniform(8, symmetric=False), inputs=x)
    >>> integers = to_integer(quantized, x)
    >>> bool((integers(x) - quantized(x)).abs().max() < 0.05)
    True
    """
    recorded = Recording(model, inputs)
    build = Builder(recorded)
    for node in recorded.graph.nodes:
        if node.op == "placeholder":
            build.placeholder(node)
        elif node.op == "output":
            build.graph.output(tuple(_result(build, each) for each in node.args[0]))
        elif any(build.is_carrier(each) for each in node.all_input_nodes):
            _carry(build, node)
        else:
            build.copy(node)
    structure = recorded.program.call_spec.out_spec
    return IntegerModel(fx.GraphModule(build.root, build.graph), structure, tuple(recorded.kwargs), recorded.batch)


def _result(build: Builder, value: Any) -> Any:
    """What the model gives back, in floats if it is an activation."""
    if not isinstance(value, fx.Node):
        return value
    if not build.is_carrier(value):
        return build.made[value]
    made, grid = build.carrier(value)
    return build.call(f"{value.name}_out", Dequantise(grid), (made,))


def _carry(build: Builder, node: fx.Node) -> None:
    """The integer form of an operation on activations."""
    name = operation(node)
    if name in OPERATIONS:
        OPERATIONS[name](build, node)
    elif name in POINTWISE:
        build.made[node], build.grids[node] = build.carrier(node.args[0])
    elif name in MOVES:
        move(build, node)
    elif name.startswith("sym_"):
        build.made[node] = build.graph.node_copy(node, lambda each: build.made[each])
    else:
        raise build.refuse(node, f"its {name} has no integer form", "keep the model simulated")


class _Structure:
    """How the outputs are nested: never changed, so copies share it."""

    def __init__(self, spec: Any):
        self.spec = spec

    def __deepcopy__(self, memo: Any) -> "_Structure":
        return self


class IntegerModel(nn.Module):
    """A model on integers; made by `to_integer`.

    Its ``state_dict`` holds integers, and a few floats for the scales of inputs and outputs.
    """

    def __init__(self, graph: fx.GraphModule, structure: Any, keywords: tuple[str, ...], batch: int | None):
        super().__init__()
        self.graph_module, self.keywords, self.batch = graph, keywords, batch
        self.structure = _Structure(structure)
        self.eval()

    def train(self, mode: bool = True) -> "IntegerModel":
        """Integers have no gradients: the model stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the quantised model gives, to rounding."""
        unknown = set(kwargs) ^ set(self.keywords)
        if unknown:
            raise InputError(
                f"recorded with the keyword arguments {list(self.keywords)}",
                where=", ".join(sorted(unknown)),
                instead="give the same",
            )
        flat = pytree.tree_leaves((args, {name: kwargs[name] for name in self.keywords}))
        count = batch_length(args, kwargs)
        if self.batch is None or self.batch == count:
            return pytree.tree_unflatten(list(self.graph_module(*flat)), self.structure.spec)
        parts = [self._padded(flat, count, start) for start in range(0, count, self.batch)]
        joined = [
            torch.cat(each)[:count] if isinstance(each[0], Tensor) and each[0].dim() else each[0]
            for each in zip(*parts, strict=True)
        ]
        return pytree.tree_unflatten(joined, self.structure.spec)

    def _padded(self, flat: list[Any], count: int, start: int) -> list[Any]:
        """The outputs for a batch as recorded, filled up with repetitions of its last example."""
        rows = torch.arange(start, start + self.batch).clamp(max=count - 1)  # type: ignore[operator]
        taken = [
            each[rows.to(each.device)] if isinstance(each, Tensor) and each.dim() and len(each) == count else each
            for each in flat
        ]
        return list(self.graph_module(*taken))
