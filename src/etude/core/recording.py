"""Recordings: the forward of a model as a graph that can be read and run again."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from etude.core.checks import InputError, UnsupportedModuleError
from etude.core.modes import evaluating

__all__ = ["Inputs", "Program", "arguments", "batches"]

Inputs = Any
"""An example batch: a tensor, a tuple of positional or a dict of keyword arguments; `arguments` checks it."""


@dataclass(frozen=True, eq=False)
class Program:
    """A recorded forward, and where its inputs come from.

    Attributes:
        graph: the recorded operations.
        model: the model itself.
        names: for each placeholder that is a parameter or buffer, its name in the model.
        constants: for each placeholder that is a constant, its value.
        batch: length of the inputs' first axis.
    """

    graph: fx.GraphModule
    model: nn.Module
    names: Mapping[str, str]
    constants: Mapping[str, Any]
    batch: int

    @classmethod
    def record(cls, model: nn.Module, inputs: Inputs) -> "Program":
        """Record the forward of ``model`` on ``inputs`` with `torch.export`."""
        _check_plain(model)
        positional, keywords = arguments(inputs)
        batch = next((len(each) for each in _tensors(inputs) if each.dim()), 0)
        if not batch:
            raise InputError("holds no batch", where="inputs", instead="give at least one example")
        try:
            with _for_recording(model):
                exported = torch.export.export(model, positional, keywords, strict=False)
        except Exception as error:
            raise InputError(
                f"torch.export cannot record its forward: {type(error).__name__}: {str(error).splitlines()[0]}",
                where=f"model {type(model).__name__}",
                instead="give example inputs that its forward takes, and a forward whose path does not hang on values",
            ) from error
        signature = exported.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_lifted_custom_objs}
        first = _first_names(model)
        return cls(
            graph=exported.graph_module,
            model=model,
            names={placeholder: first.get(name, name) for placeholder, name in names.items()},
            constants={placeholder: exported.constants[name] for placeholder, name in lifted.items()},
            batch=batch,
        )

    def run(self, inputs: Inputs, nodes: tuple[str, ...], model: nn.Module | None = None) -> dict[str, Tensor]:
        """The values of ``nodes`` for ``inputs``."""
        known = {node.name for node in self.graph.graph.nodes}
        for name in nodes:
            if name not in known:
                raise InputError("no such node", where=f"node {name!r}", instead="take names from the flow's steps")
        model = self.model if model is None else model
        values = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        found: dict[str, list[Tensor]] = {name: [] for name in nodes}
        with torch.no_grad():
            for rows, count in batches(inputs, self.batch):
                for name, value in self._run_batch(rows, nodes, values).items():
                    found[name].append(value[:count] if len(value) == self.batch else value)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _run_batch(self, inputs: Inputs, nodes: tuple[str, ...], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = iter(_tensors(inputs))
        placed = []
        for node in self.graph.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in self.names:
                placed.append(values[self.names[node.name]])
            elif node.name in self.constants:
                placed.append(self.constants[node.name])
            else:
                placed.append(next(given) if isinstance(node.meta.get("val"), Tensor) else node.meta.get("val"))
        recorder = _Recorder(self.graph, nodes)
        recorder.run(*placed)
        return recorder.found


class _Recorder(fx.Interpreter):
    """Runs a recorded graph and keeps the values of some nodes."""

    def __init__(self, graph: fx.GraphModule, nodes: tuple[str, ...]):
        super().__init__(graph)
        self.wanted, self.found = frozenset(nodes), dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.found[n.name] = value
        return value


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that ``inputs`` stand for.

    >>> arguments({"x": 1}), arguments((1, 2))
    (((), {'x': 1}), ((1, 2), {}))
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, list | tuple):
        return tuple(inputs), {}
    raise InputError(
        f"got {type(inputs).__name__}", where="inputs", instead="give a tensor, a tuple of arguments or a dict of them"
    )


def batches(inputs: Inputs, size: int) -> Iterator[tuple[Inputs, int]]:
    """``inputs`` in batches of exactly ``size``, with how many of each are new: the last is filled with its end."""
    lengths = {len(each) for each in _tensors(inputs) if each.dim()}
    if len(lengths) != 1:
        raise InputError(f"first axes have lengths {sorted(lengths)}", where="inputs", instead="give one batch")
    (total,) = lengths
    for start in range(0, total, size):
        rows = torch.arange(start, start + size).clamp(max=total - 1)
        yield _rows(inputs, rows), min(size, total - start)


def _rows(inputs: Inputs, rows: Tensor) -> Inputs:
    """The chosen rows of every tensor among the arguments."""

    def one(value: Any) -> Any:
        return value[rows.to(value.device)] if isinstance(value, Tensor) and value.dim() else value

    if isinstance(inputs, Mapping):
        return {name: one(value) for name, value in inputs.items()}
    return one(inputs) if isinstance(inputs, Tensor) else tuple(one(value) for value in inputs)


def _tensors(inputs: Inputs) -> list[Tensor]:
    positional, keywords = arguments(inputs)
    return [each for each in (*positional, *keywords.values()) if isinstance(each, Tensor)]


def _first_names(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def _check_plain(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if nn.utils.parametrize.is_parametrized(module):
            raise UnsupportedModuleError(
                path,
                module,
                "its weights are parametrized",
                instead="make them plain first: etude.core.params.bake_masks for a masked model, "
                "torch.nn.utils.parametrize.remove_parametrizations those of any other",
            )


@contextmanager
def _for_recording(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no fused attention kernels, no caches of past keys among the outputs; all put back after."""
    fast = torch.backends.mha.get_fastpath_enabled()
    configuration: Any = getattr(model, "config", None)
    caching = getattr(configuration, "use_cache", None)
    torch.backends.mha.set_fastpath_enabled(False)
    if caching:
        configuration.use_cache = False
    try:
        with evaluating(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the recorder, on how modules keep their tensors
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if caching:
            configuration.use_cache = caching
