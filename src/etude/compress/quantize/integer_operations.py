"""The integer form of every operation that `to_integer` knows."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from etude.compress.quantize.granularity import PerChannel, PerTensor
from etude.compress.quantize.integer_graph import Builder, arguments, operation, zero_point
from etude.compress.quantize.integer_layers import (
    CARRIER_BITS,
    AddMask,
    Gather,
    Grid,
    IntegerAttention,
    IntegerAverage,
    IntegerConvolution,
    IntegerEmbedding,
    IntegerFunction,
    IntegerLayerNorm,
    IntegerLinear,
    IntegerMatmul,
    IntegerMaxPool,
    IntegerProduct,
    IntegerSum,
    Rescale,
)
from etude.compress.quantize.layers import QuantizedLayer
from etude.compress.quantize.quantizers import UniformQuantizer
from etude.core.checks import UnsupportedModuleError

__all__ = ["OPERATIONS", "move"]

FUNCTION_STEP = 2.0**-12
"""The grid on which non-linear functions are computed."""
FUNCTION_REACH = 2**20 - 1
"""The largest integer they are given."""
LONGEST_SUM = (2**31 - 1) // (127 * 255)
"""Products of 8-bit codes that a 32-bit sum surely holds."""


def _layer(build: Builder, node: fx.Node) -> tuple[str, QuantizedLayer, UniformQuantizer]:
    """The layer at a node, and its weight's quantizer, if integers can compute it."""
    found = build.layer_of(node)
    if found is None:
        raise build.refuse(node, "its weight is not quantised", "quantise it, do not skip it")
    path, layer = found
    quantizer = layer.weight_quantizer
    one_an_output = isinstance(quantizer, UniformQuantizer) and quantizer.granularity in (
        PerTensor(),
        PerChannel(together=getattr(quantizer.granularity, "together", 1)),
    )
    if not isinstance(quantizer, UniformQuantizer) or not one_an_output:
        raise UnsupportedModuleError(
            path,
            layer.layer,
            "its weight's levels are no product of a code and one scale an output",
            instead="use Uniform with PerTensor() or PerChannel()",
        )
    if quantizer.code_type is not torch.int8 or quantizer.zero_point is not None:
        raise UnsupportedModuleError(
            path, layer.layer, "its weight is not symmetric, or has more than 8 bits", instead="use such a scheme"
        )
    return path, layer, quantizer


def _input_codes(build: Builder, node: fx.Node, source: Any) -> tuple[fx.Node, Rescale, Tensor]:
    """A layer's input carrier, what makes signed 8-bit codes of it, and their scale."""
    path, layer, _ = _layer(build, node)
    quantizer = layer.input_quantizer
    if not isinstance(quantizer, UniformQuantizer) or quantizer.scale.numel() != 1:
        raise UnsupportedModuleError(
            path,
            layer.layer,
            "its input is not quantised with one scale known beforehand",
            instead="give quantize() activations=Uniform(8, symmetric=False) and inputs",
        )
    if quantizer.highest - quantizer.lowest > 255:
        raise UnsupportedModuleError(path, layer.layer, "its input has more than 8 bits", instead="use 8")
    # Unsigned 8-bit codes are moved by 128, so that all operands are signed.
    moved = 128 if quantizer.highest > 127 else 0
    made, grid = build.carrier(source)
    step = quantizer.scale.double().reshape(())
    lowest, highest = quantizer.lowest - moved, quantizer.highest - moved
    return made, Rescale(grid, step, lowest, highest, zero_point(quantizer) - moved), step


def _weights(build: Builder, node: fx.Node, step: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """A layer's weight codes, the scales of its sums, its bias on their grid, and the guard bits of that."""
    path, layer, quantizer = _layer(build, node)
    codes = layer.codes()
    if codes[0].numel() > LONGEST_SUM:
        raise UnsupportedModuleError(path, layer.layer, f"its sums have more than {LONGEST_SUM} terms")
    guard = max(16 - quantizer.code_bits() - layer.input_quantizer.code_bits(), 0)  # type: ignore[operator, union-attr]
    scales = quantizer.scale.double() * step / 2**guard
    scales = scales.repeat_interleave(len(codes) // scales.numel())
    bias = torch.zeros_like(scales) if layer.bias is None else (layer.bias.double() / scales).round()
    if bool((bias.abs() >= 2**30).any()):
        raise UnsupportedModuleError(path, layer.layer, "its bias does not fit 32 bits at the scale of its sums")
    return codes, scales, bias.long(), guard


def _linear(build: Builder, node: fx.Node) -> None:
    source = node.args[1] if operation(node) == "addmm" else node.args[0]
    made, codes_of, step = _input_codes(build, node, source)
    codes, scales, bias, guard = _weights(build, node, step)
    build.place(node, IntegerLinear(codes, bias, codes_of, guard), (made,), Grid(scales, -1))


def _convolution(build: Builder, node: fx.Node) -> None:
    path, layer, _ = _layer(build, node)
    if getattr(layer.layer, "padding_mode", "zeros") != "zeros":
        raise UnsupportedModuleError(path, layer.layer, "it pads with other than zeros")
    made, codes_of, step = _input_codes(build, node, node.args[0])
    codes, scales, bias, guard = _weights(build, node, step)
    module = IntegerConvolution(codes, bias, codes_of, layer.layer, guard)
    build.place(node, module, (made,), Grid(scales, 1 - node.meta["val"].dim()))


def _embedding(build: Builder, node: fx.Node) -> None:
    _, layer, quantizer = _layer(build, node)
    scale = build.carrier_scale(node)
    module = IntegerEmbedding(layer.codes(), quantizer.scale, scale)
    build.place(node, module, (build.made[node.args[1]],), Grid.single(scale))


def _batch_norm(build: Builder, node: fx.Node) -> None:
    """Batch norm is a factor and a term for each channel: they go into the layer's scales and bias."""
    given = arguments(node, ("input", "weight", "bias", "mean", "variance", "training", "momentum", "eps"))
    source = given["input"]
    before = build.root.get_submodule(str(build.made[source].target)) if source in build.made else None
    if not isinstance(before, IntegerLinear | IntegerConvolution) or len(source.users) > 1:
        raise build.refuse(node, "it does not follow a quantised layer", "fold it into a layer first")
    held = {
        name: build.recorded.held[given[name].name].double()
        for name in ("weight", "bias", "mean", "variance")
        if given[name] is not None
    }
    factor = (held["variance"] + given["eps"]).rsqrt() * held.get("weight", 1.0)
    term = held.get("bias", 0.0) - held["mean"] * factor
    # A channel whose factor is zero keeps its grid and loses its weights.
    scales = build.grids[source].scale * torch.where(factor == 0, torch.ones_like(factor), factor.abs())
    sign = factor.sign()
    before.codes = (before.codes * sign.view(-1, *[1] * (before.codes.dim() - 1))).to(before.codes.dtype)
    before.bias = (before.bias * sign + term / scales).round().int()
    build.made[node], build.grids[node] = build.made[source], Grid(scales, build.grids[source].axis)


# Pointwise


def _relu(build: Builder, node: fx.Node) -> None:
    made, grid = build.carrier(node.args[0])
    build.made[node], build.grids[node] = build.graph.call_function(torch.clamp, (made,), {"min": 0}), grid


def _clamp(build: Builder, node: fx.Node) -> None:
    made, grid = build.single(node.args[0], CARRIER_BITS + 1)
    given = {"min_val": -1.0, "max_val": 1.0} | arguments(node, ("input", "min_val", "max_val"))
    low, high = (0.0, 6.0) if operation(node) == "relu6" else (given["min_val"], given["max_val"])
    bounds = [round(each / float(grid.scale)) for each in (low, high)]
    build.made[node], build.grids[node] = build.graph.call_function(torch.clamp, (made, *bounds)), grid


def _add(build: Builder, node: fx.Node) -> None:
    left, right = node.args[:2]
    sign = -1 if operation(node) == "sub" else 1
    if node.kwargs.get("alpha", 1) != 1:
        raise build.refuse(node, "it adds a multiple")
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        _add_number(build, node, left, right, sign)
    elif build.is_carrier(left) and build.is_carrier(right):
        _add_carriers(build, node, left, right, sign)
    elif build.is_carrier(left) and sign == 1:
        made, grid = build.single(left, 26)
        build.place(node, AddMask(float(grid.scale)), (made, build.made[right]), grid)
    else:
        raise build.refuse(node, "it adds activations to what is computed from indices")


def _add_carriers(build: Builder, node: fx.Node, left: fx.Node, right: fx.Node, sign: int) -> None:
    scale = build.carrier_scale(node)
    (one, first), (other, second) = build.to(left, scale), build.to(right, scale)
    second = second.negated() if sign < 0 else second
    build.place(node, IntegerSum(first, second), (one, other), Grid.single(scale))


def _add_number(build: Builder, node: fx.Node, left: Any, right: Any, sign: int) -> None:
    source, number = (left, right) if isinstance(left, fx.Node) else (right, left)
    if sign < 0 and source is right:
        raise build.refuse(node, "it takes activations from a number")
    made, grid = build.single(source)
    steps = round(sign * float(number) / float(grid.scale))
    build.made[node] = made if not steps else build.graph.call_function(torch.add, (made, steps))
    build.grids[node] = grid


def _multiply(build: Builder, node: fx.Node) -> None:
    left, right = node.args[:2]
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        source, number = (left, right) if isinstance(left, fx.Node) else (right, left)
        _scale(build, node, source, number)
    elif build.is_carrier(left) and build.is_carrier(right):
        made, module, scale = _product(build, node, left, right)
        build.place(node, module, made, Grid.single(scale))
    else:
        raise build.refuse(node, "it multiplies activations with what is computed from indices")


def _product(
    build: Builder, node: fx.Node, left: Any, right: Any
) -> tuple[tuple[fx.Node, fx.Node], IntegerProduct, float]:
    steps = [build.largest(each) / 2**CARRIER_BITS for each in (left, right)]
    (one, first), (other, second) = build.to(left, steps[0]), build.to(right, steps[1])
    scale = build.carrier_scale(node)
    return (one, other), IntegerProduct(first, second, Rescale(Grid.single(steps[0] * steps[1]), scale)), scale


def _divide(build: Builder, node: fx.Node) -> None:
    if isinstance(node.args[1], fx.Node):
        raise build.refuse(node, "it divides by an activation")
    divisor: Any = node.args[1]
    _scale(build, node, node.args[0], 1 / divisor)


def _scale(build: Builder, node: fx.Node, source: Any, factor: Any) -> None:
    """A positive factor changes what an integer stands for, not the integer."""
    if not factor > 0:
        raise build.refuse(node, f"it multiplies by {factor}")
    made, grid = build.carrier(source)
    build.made[node], build.grids[node] = made, Grid(grid.scale * factor, grid.axis)


def _power(build: Builder, node: fx.Node) -> None:
    source, exponent = node.args[0], node.args[1]
    if exponent not in (2, 3):
        raise build.refuse(node, f"it raises to the power {exponent}")
    made, module, scale = _product(build, node, source, source)
    if exponent == 2:
        build.place(node, module, made, Grid.single(scale))
        return
    step = build.largest(source) / 2**CARRIER_BITS
    middle = step * build.largest(source)
    square = IntegerProduct(module.left, module.right, Rescale(Grid.single(step * step), middle))
    squared = build.call(f"{node.name}_square", square, made)
    same = Rescale(Grid.single(middle), middle)
    cube = IntegerProduct(same, build.to(source, step)[1], Rescale(Grid.single(middle * step), scale))
    build.place(node, cube, (squared, made[0]), Grid.single(scale))


def _function(build: Builder, node: fx.Node) -> None:
    kind, dim = operation(node), None
    made, grid = build.carrier(node.args[0])
    if kind == "softmax":
        dim = arguments(node, ("input", "dim"))["dim"]
        made, grid = build.single(node.args[0])
    result = IntegerFunction.result_grid(kind, FUNCTION_STEP)
    scale = build.carrier_scale(node) if kind == "gelu" else float(result.scale)
    function_grid = Rescale(grid, FUNCTION_STEP, -FUNCTION_REACH, FUNCTION_REACH)
    module = IntegerFunction(kind, function_grid, FUNCTION_STEP, Rescale(result, scale), dim)
    build.place(node, module, (made,), Grid.single(scale))


def _silu(build: Builder, node: fx.Node) -> None:
    source = node.args[0]
    made, grid = build.carrier(source)
    result = IntegerFunction.result_grid("sigmoid", FUNCTION_STEP)
    function_grid = Rescale(grid, FUNCTION_STEP, -FUNCTION_REACH, FUNCTION_REACH)
    function = IntegerFunction("sigmoid", function_grid, FUNCTION_STEP, Rescale(result, result.scale))
    gate = build.call(f"{node.name}_gate", function, (made,))
    step, scale = build.largest(source) / 2**CARRIER_BITS, build.carrier_scale(node)
    output = Rescale(Grid.single(step * float(result.scale)), scale)
    build.place(
        node,
        IntegerProduct(build.to(source, step)[1], Rescale(result, result.scale), output),
        (made, gate),
        Grid.single(scale),
    )


def _layer_norm(build: Builder, node: fx.Node) -> None:
    given = {"eps": 1e-5} | arguments(node, ("input", "normalized_shape", "weight", "bias", "eps"))
    if len(given["normalized_shape"]) != 1:
        raise build.refuse(node, "it normalises over several axes")
    made, grid = build.single(given["input"], 20)
    width, held = int(given["normalized_shape"][0]), build.recorded.held
    gain, bias = (
        held[given[name].name].double() if given.get(name) is not None else torch.full((width,), value).double()
        for name, value in (("weight", 1.0), ("bias", 0.0))
    )
    scale, step = build.carrier_scale(node), float(grid.scale)
    # The variance keeps 2 * (12 - 4) bits of fraction.
    epsilon = min(round(given["eps"] / step**2 * 4.0**8), 2**60)
    module = IntegerLayerNorm(Rescale(grid, step), epsilon, gain * 2.0**-12 / scale, bias / scale)
    build.place(node, module, (made,), Grid.single(scale))


# Products of activations, and where values go


def _matmul(build: Builder, node: fx.Node) -> None:
    (one, first, step), (other, second, step2) = build.codes(node.args[0]), build.codes(node.args[1])
    build.place(node, IntegerMatmul(first, second), (one, other), Grid.single(step * step2))


def _attention(build: Builder, node: fx.Node) -> None:
    given = arguments(node, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"))
    if given.get("enable_gqa"):
        raise build.refuse(node, "its queries share keys")
    (one, first, step), (two, second, step2), (three, third, step3) = (
        build.codes(given[name]) for name in ("query", "key", "value")
    )
    factor = given.get("scale") or 1 / math.sqrt(given["query"].meta["val"].shape[-1])
    scores = Rescale(Grid.single(step * step2 * factor), FUNCTION_STEP, -(2**28), 2**28)
    shares = Rescale(Grid.single(2.0**-15), 1 / 255, 0, 255)
    module = IntegerAttention(first, second, third, scores, FUNCTION_STEP, shares)
    mask = given.get("attn_mask")
    mask = None if mask is None else build.made[mask]
    build.place(node, module, (one, two, three, mask, bool(given.get("is_causal"))), Grid.single(step3 / 255))


def move(build: Builder, node: fx.Node) -> None:
    """Move integers as the floats they stand for; those of several scales are brought to one first."""
    source = next(each for each in node.all_input_nodes if build.is_carrier(each))
    made, grid = build.single(source)
    build.made[node] = build.graph.node_copy(node, lambda each: made if each is source else build.made[each])
    build.grids[node] = grid


def _concatenate(build: Builder, node: fx.Node) -> None:
    given = {"dim": 0} | arguments(node, ("tensors", "dim"))
    scale = build.carrier_scale(node)
    parts = [build.to(each, scale) for each in given["tensors"]]
    gather = Gather([part for _, part in parts], given["dim"])
    build.place(node, gather, tuple(made for made, _ in parts), Grid.single(scale))


def _pad(build: Builder, node: fx.Node) -> None:
    names = ("input", "pad", "mode", "value") if operation(node) == "pad" else ("input", "pad", "value")
    given = arguments(node, names)
    if given.get("mode", "constant") != "constant" or given.get("value"):
        raise build.refuse(node, "it pads with other than zeros")
    move(build, node)


def _pair(size: Any) -> list[int]:
    sizes = list(size) if isinstance(size, list | tuple) else [size]
    return sizes * 2 if len(sizes) == 1 else sizes


def _max_pool(build: Builder, node: fx.Node) -> None:
    given = arguments(node, ("input", "kernel", "stride", "padding", "dilation", "ceil_mode"))
    if given.get("ceil_mode"):
        raise build.refuse(node, "it rounds its output's size up")
    kernel = _pair(given["kernel"])
    stride = _pair(given.get("stride") or kernel)
    module = IntegerMaxPool(kernel, stride, _pair(given.get("padding", 0)), _pair(given.get("dilation", 1)))
    made, grid = build.carrier(given["input"])
    build.place(node, module, (made,), grid)


def _average_pool(build: Builder, node: fx.Node) -> None:
    given = arguments(node, ("input", "kernel", "stride", "padding", "ceil_mode"))
    kernel = _pair(given["kernel"])
    if any(_pair(given.get("padding", 0))) or given.get("ceil_mode"):
        raise build.refuse(node, "it averages over padding")
    _average(build, node, IntegerAverage(kernel=kernel, stride=_pair(given.get("stride") or kernel)), math.prod(kernel))


def _adaptive_pool(build: Builder, node: fx.Node) -> None:
    given = arguments(node, ("input", "output_size"))
    if _pair(given["output_size"]) != [1, 1]:
        raise build.refuse(node, "it pools to more than one pixel")
    height, width = given["input"].meta["val"].shape[-2:]
    _average(build, node, IntegerAverage([-2, -1], True), int(height) * int(width))


def _mean(build: Builder, node: fx.Node) -> None:
    given = arguments(node, ("input", "dim", "keepdim"))
    shape = given["input"].meta["val"].shape
    module = IntegerAverage(list(given["dim"]), bool(given.get("keepdim")))
    _average(build, node, module, math.prod(int(shape[dim]) for dim in given["dim"]))


def _average(build: Builder, node: fx.Node, module: IntegerAverage, count: int) -> None:
    made, grid = build.single(node.args[0], 30 - math.ceil(math.log2(count)))
    build.place(node, module, (made,), Grid(grid.scale / count))


def _nothing(build: Builder, node: fx.Node) -> None:
    """An assertion on floats has no place among integers."""


OPERATIONS: dict[str, Callable[[Builder, fx.Node], None]] = {
    "_assert_tensor_metadata": _nothing,
    "adaptive_avg_pool2d": _adaptive_pool,
    "add": _add,
    "addmm": _linear,
    "avg_pool2d": _average_pool,
    "batch_norm": _batch_norm,
    "bmm": _matmul,
    "cat": _concatenate,
    "constant_pad_nd": _pad,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _convolution,
    "conv_transpose2d": _convolution,
    "conv_transpose3d": _convolution,
    "div": _divide,
    "embedding": _embedding,
    "gelu": _function,
    "hardtanh": _clamp,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool2d": _max_pool,
    "mean": _mean,
    "mul": _multiply,
    "pad": _pad,
    "pow": _power,
    "relu": _relu,
    "relu6": _clamp,
    "scaled_dot_product_attention": _attention,
    "sigmoid": _function,
    "silu": _silu,
    "softmax": _function,
    "sub": _add,
    "tanh": _function,
}
