r"""Sensitivity: what it costs to give one layer few bits, measured without quantising the others.

The tables made here are what `etude.compress.quantize.allocation` spends a budget by.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from etude.compress.quantize.curvature import Loss, hessian_eigenvalues, hessian_traces
from etude.compress.quantize.granularity import PerChannel
from etude.compress.quantize.layers import QuantizedLayer, output_first
from etude.compress.quantize.model import Inputs, calls, quantize, quantized_layers
from etude.compress.quantize.schemes import Scheme, Uniform
from etude.core.checks import InputError, UnsupportedModuleError, check_at_least, check_one_of
from etude.core.modes import evaluating

__all__ = ["Sensitivity", "channelwise", "latencies", "layer_sensitivity", "multiplications"]


def channelwise(bits: int) -> Uniform:
    """The usual scheme of weights: symmetric, with one scale for each output channel.

    >>> channelwise(4).granularity
    PerChannel(axis=0, together=1)
    """
    return Uniform(bits, granularity=PerChannel())


@dataclass(frozen=True)
class Sensitivity:
    """What every layer costs at every number of bits.

    Attributes:
        layers: paths.
        bits: the choices, ascending.
        costs: (layers, bits) harm done to the loss; only comparisons mean something.
        weights: (layers,) number of weights.
        method: how it was measured.
        curvature: (layers,) the mean eigenvalue or the top one, where the method uses it.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    costs: Float[Tensor, "layers bits"]
    weights: Float[Tensor, "layers"]
    method: str
    curvature: Float[Tensor, "layers"] | None = None

    def summary(self) -> str:
        """A table as text."""
        width = max(len(path) for path in self.layers)
        head = " " * width + "".join(f"{f'{bits} bits':>12}" for bits in self.bits)
        rows = [
            f"{path:<{width}}" + "".join(f"{float(cost):>12.3g}" for cost in row)
            for path, row in zip(self.layers, self.costs, strict=True)
        ]
        return "\n".join([head, *rows])

    def plot(self, ax: Any = None) -> Any:
        """Costs by layer, a line for each number of bits, on a logarithmic scale."""
        import matplotlib.pyplot as plt

        axes = plt.subplots()[1] if ax is None else ax
        for index, bits in enumerate(self.bits):
            axes.plot(range(len(self.layers)), self.costs[:, index].clamp(min=1e-30), marker="o", label=f"{bits} bits")
        axes.set(yscale="log", ylabel=f"cost ({self.method})")
        axes.set_xticks(range(len(self.layers)), self.layers, rotation=90)
        axes.legend()
        return axes


def layer_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    bits: Sequence[int] = (2, 4, 8),
    method: str = "trace",
    loss: Loss | None = None,
    scheme: Callable[[int], Scheme] = channelwise,
    skip: Sequence[str] = (),
    probes: int = 50,
    generator: torch.Generator | None = None,
) -> Sensitivity:
    r"""How much each layer's weights suffer from few bits.

    Args:
        model: a float model.
        batches: for ``divergence`` batches of inputs, as of `quantize`; else of what ``loss`` takes. They may be
            synthetic (`synthesize`).
        bits: the choices.
        method: ``trace``, :math:`\frac{\text{Tr} H_i}{n_i} \|Q_b(W_i) - W_i\|^2` (HAWQ-V2); ``eigenvalue``,
            :math:`\lambda_i \|Q_b(W_i) - W_i\|^2` with the top eigenvalue (HAWQ); ``divergence``, the mean
            :math:`KL(p \| p_{i, b})` of class probabilities with layer i alone quantised (ZeroQ), without labels.
        loss: ``loss(model, batch)``, the mean loss, for the first two.
        scheme: gives the scheme of weights for a number of bits.
        skip: as of `quantize`.
        probes: of the trace; iterations of the eigenvalue.
        generator: CPU generator of probes; seed 0 if not given.

    Raises:
        InputError: for unusable arguments.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> table = layer_sensitivity(model, [torch.randn(32, 4)], method="divergence")
    >>> table.layers, table.bits, bool((table.costs[:, 0] > table.costs[:, 2]).all())
    (('0', '2'), (2, 4, 8), True)
    """
    check_one_of("method", method, ("trace", "eigenvalue", "divergence"))
    choices = tuple(sorted(set(bits)))
    if not choices:
        raise InputError("got none", where="bits", instead="give at least one number")
    if method != "divergence" and loss is None:
        raise InputError("got none", where="loss", instead="give loss(model, batch), or method='divergence'")
    networks = {each: quantize(model, scheme(each), skip=skip, generator=generator) for each in choices}
    network, layers = _as_float(networks[choices[0]])
    weights = torch.tensor([float(layer.master.numel()) for layer in layers.values()])
    quantizers = {
        each: {path: layer.weight_quantizer for path, layer in quantized_layers(other).items()}
        for each, other in networks.items()
        if each != choices[0]
    } | {choices[0]: {path: held for path, (_, held) in _held(layers).items()}}
    for layer in layers.values():
        layer.weight_quantizer = nn.Identity()
    if method == "divergence":
        costs = _divergences(network, layers, quantizers, choices, list(batches))
        return Sensitivity(tuple(layers), choices, costs, weights, method)
    assert loss is not None
    names = [f"{path}.layer.weight".lstrip(".") for path in layers]
    curvature = _curvature(network, loss, batches, names, method, probes, generator)
    if method == "trace":
        curvature = curvature / weights
    costs = curvature.unsqueeze(1) * _changes(layers, quantizers, choices)
    return Sensitivity(tuple(layers), choices, costs, weights, method, curvature)


def _curvature(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    names: list[str],
    method: str,
    probes: int,
    generator: torch.Generator | None,
) -> Tensor:
    if method == "trace":
        found = hessian_traces(network, loss, batches, names, probes=probes, generator=generator)
        # A negative estimate says that the layer does not matter, not that errors help.
        return torch.tensor([max(found[name].value, 0.0) for name in names])
    values = hessian_eigenvalues(network, loss, batches, names, iterations=probes, generator=generator)
    return torch.tensor([abs(values[name]) for name in names])


def _as_float(network: nn.Module) -> tuple[nn.Module, dict[str, QuantizedLayer]]:
    layers = quantized_layers(network)
    if not layers:
        raise InputError("has no layer to quantise", where="model")
    return network, layers


def _held(layers: Mapping[str, QuantizedLayer]) -> dict[str, tuple[QuantizedLayer, nn.Module]]:
    return {path: (layer, layer.weight_quantizer) for path, layer in layers.items()}


@torch.no_grad()
def _changes(
    layers: Mapping[str, QuantizedLayer], quantizers: Mapping[int, Mapping[str, Any]], choices: Sequence[int]
) -> Float[Tensor, "layers bits"]:
    """Squared distances of quantised weights."""
    rows = []
    for path, layer in layers.items():
        weight = output_first(layer.layer, layer.master)
        rows.append([float((quantizers[bits][path](weight) - weight).square().sum()) for bits in choices])
    return torch.tensor(rows)


@torch.no_grad()
def _divergences(
    network: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    quantizers: Mapping[int, Mapping[str, Any]],
    choices: Sequence[int],
    batches: list[Any],
) -> Float[Tensor, "layers bits"]:
    arguments = [each for batch in batches for each in calls(batch if isinstance(batch, Mapping) else [batch])]
    if not arguments:
        raise InputError("there is no batch", where="batches", instead="give at least one")
    costs = torch.zeros(len(layers), len(choices))
    with evaluating(network):
        wanted = [_log_probabilities(network(*args, **kwargs)) for args, kwargs in arguments]
        for row, (path, layer) in enumerate(layers.items()):
            for column, bits in enumerate(choices):
                layer.weight_quantizer = quantizers[bits][path]
                found = [_log_probabilities(network(*args, **kwargs)) for args, kwargs in arguments]
                total = [
                    F.kl_div(own, float_one, reduction="sum", log_target=True)
                    for own, float_one in zip(found, wanted, strict=True)
                ]
                costs[row, column] = float(torch.stack(total).sum()) / sum(each[..., 0].numel() for each in wanted)
            layer.weight_quantizer = nn.Identity()
    return costs.clamp(min=0)


def _log_probabilities(outputs: Any) -> Tensor:
    scores = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(scores, Tensor):
        raise InputError(
            f"the model returns {type(outputs).__name__}", where="method", instead="give one that returns class scores"
        )
    return scores.float().log_softmax(-1)


@torch.no_grad()
def multiplications(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Multiplications of each linear and convolutional layer (quantised or not) for one example, by path.

    Args:
        model: any module.
        inputs: a batch, or batches of which the first is taken.

    >>> multiplications(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(2, 3, 6, 6))
    {'0': 3456}
    """
    found: dict[str, int] = {}
    args, kwargs = next(calls(inputs))
    examples = len(next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)))
    hooks = []
    quantized = [f"{path}.layer" for path in quantized_layers(model)]
    for path, module in model.named_modules():
        layer: Any = module.layer if isinstance(module, QuantizedLayer) else module
        weight = getattr(layer, "weight", None)
        if path in quantized or not isinstance(weight, Tensor) or weight.dim() < 2 or isinstance(layer, nn.Embedding):
            continue

        def count(module: nn.Module, args: Any, output: Tensor, path: str = path, layer: Any = layer) -> None:
            weight = output_first(layer, layer.weight)
            found[path] = found.get(path, 0) + output.numel() // examples * weight[0].numel()

        hooks.append(module.register_forward_hook(count))
    try:
        with evaluating(model):
            model(*args, **kwargs)
    finally:
        for handle in hooks:
            handle.remove()
    return found


@torch.no_grad()
def latencies(
    models: Mapping[int, nn.Module], inputs: Inputs, layers: Sequence[str], *, repeats: int = 10, warm_up: int = 2
) -> Float[Tensor, "layers bits"]:
    """Seconds that each layer takes, measured on this machine, in models that execute at different numbers of bits.

    Give models that really compute so, e.g. from `to_integer`: simulated quantisation is no faster at fewer bits.
    The median over the repeats; of a layer that runs several times in a forward the sum.

    Args:
        models: for each number of bits a model; columns are in ascending order of bits.
        inputs: a batch, or batches of which the first is taken.
        layers: paths that exist in every model.
        repeats: forwards timed.
        warm_up: forwards before.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> latencies({8: model}, torch.randn(32, 4), ["0", "2"]).shape
    torch.Size([2, 1])
    """
    check_at_least("repeats", repeats, 1)
    args, kwargs = next(calls(inputs))
    columns = [_timed(models[bits], args, kwargs, layers, repeats, warm_up) for bits in sorted(models)]
    if not columns:
        raise InputError("got none", where="models", instead="give a model for each number of bits")
    return torch.stack(columns, 1)


def _timed(model: nn.Module, args: Any, kwargs: Any, layers: Sequence[str], repeats: int, warm_up: int) -> Tensor:
    known = dict(model.named_modules())
    spent = torch.zeros(warm_up + repeats, len(layers))
    hooks, started, current = [], [0.0] * len(layers), [0]
    for index, path in enumerate(layers):
        if path not in known:
            raise InputError("no such module", where=f"layer {path!r}", instead="name modules of every model")
        if path == "" and isinstance(known[path], nn.ModuleList):
            raise UnsupportedModuleError(path, known[path], "it does not run")

        def begin(module: nn.Module, args: Any, index: int = index) -> None:
            _wait(args)
            started[index] = time.perf_counter()

        def end(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
            _wait((output,))
            spent[current[0], index] += time.perf_counter() - started[index]

        hooks += [known[path].register_forward_pre_hook(begin), known[path].register_forward_hook(end)]
    try:
        with evaluating(model):
            for current[0] in range(warm_up + repeats):
                model(*args, **kwargs)
    finally:
        for handle in hooks:
            handle.remove()
    return spent[warm_up:].median(0).values


def _wait(values: Iterable[Any]) -> None:
    """Accelerators compute on while Python goes ahead."""
    for value in values:
        if isinstance(value, Tensor) and value.device.type == "cuda":
            torch.cuda.synchronize(value.device)
