"""Curvature of the loss, layer by layer: traces and top eigenvalues of the Hessian's diagonal blocks.

Both need only products of the Hessian with vectors, two backward passes each.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from etude.core.checks import InputError, check_at_least
from etude.core.modes import evaluating

__all__ = ["Estimate", "hessian_eigenvalues", "hessian_traces"]

Loss = Callable[[nn.Module, Any], Tensor]
"""The mean loss of a model on a batch."""


class Estimate(NamedTuple):
    """A Monte Carlo estimate: ``value``, the mean over probes, and ``error``, its standard error."""

    value: float
    error: float


def hessian_traces(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    parameters: Iterable[str],
    *,
    probes: int = 50,
    generator: torch.Generator | None = None,
) -> dict[str, Estimate]:
    r"""The trace of each parameter's block of the Hessian, by Hutchinson's method: :math:`\text{Tr} H = E[v^\top H v]`.

    Each probe v holds random signs for all parameters at once, so that one product serves every layer; what other
    layers add has mean zero and shows in the standard error.

    Args:
        model: any module; taken in evaluation mode.
        loss: ``loss(model, batch)``, the mean loss of a batch.
        batches: of equal size, anything ``loss`` understands; the loss is their mean.
        parameters: names.
        probes: products; HAWQ-V2 takes 50.
        generator: CPU generator of the probes; seed 0 if not given.

    Dong et al., HAWQ-V2, NeurIPS 2020.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> data = [torch.tensor([[1.0, 0.0], [0.0, 1.0]])]
    >>> found = hessian_traces(model, lambda model, x: model(x).square().mean(), data, ["weight"])
    >>> round(found["weight"].value, 6)
    2.0
    """
    check_at_least("probes", probes, 2)
    chosen, data = _chosen(model, parameters), _listed(batches)
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    signs = [{name: _signs(p, draws) for name, p in chosen.items()} for _ in range(probes)]
    sums = torch.zeros(len(chosen), probes, dtype=torch.float64)
    for gradients in _gradients(model, loss, data, chosen):
        for index, probe in enumerate(signs):
            products = torch.autograd.grad(
                list(gradients.values()),
                list(chosen.values()),
                list(probe.values()),
                retain_graph=True,
                materialize_grads=True,
            )
            dots = [(v * each).sum() for v, each in zip(probe.values(), products, strict=True)]
            sums[:, index] += torch.stack(dots).double().cpu() / len(data)
    means, errors = sums.mean(1), sums.std(1) / probes**0.5
    return {name: Estimate(float(m), float(e)) for name, m, e in zip(chosen, means, errors, strict=True)}


def hessian_eigenvalues(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    parameters: Iterable[str],
    *,
    iterations: int = 50,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """The eigenvalue of largest magnitude of each parameter's block of the Hessian, by power iteration.

    Args:
        model: any module; taken in evaluation mode.
        loss: as of `hessian_traces`.
        batches: as of `hessian_traces`.
        parameters: names.
        iterations: at most so many products for each parameter.
        tolerance: end when a round changes the value by a smaller share.
        generator: CPU generator of the starts; seed 0 if not given.

    Dong et al., HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision, ICCV 2019.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> data = [torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
    >>> found = hessian_eigenvalues(model, lambda model, x: model(x).square().mean(), data, ["weight"])
    >>> round(found["weight"], 3)
    4.0
    """
    check_at_least("iterations", iterations, 1)
    chosen, data = _chosen(model, parameters), _listed(batches)
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    vectors = {name: _unit(torch.randn(p.shape, generator=draws).to(p)) for name, p in chosen.items()}
    values = dict.fromkeys(chosen, 0.0)
    left = set(chosen)
    for _ in range(iterations):
        products = {name: torch.zeros_like(vectors[name]) for name in left}
        for gradients in _gradients(model, loss, data, chosen):
            for name in left:
                (product,) = torch.autograd.grad(
                    gradients[name], chosen[name], vectors[name], retain_graph=True, materialize_grads=True
                )
                products[name] += product / len(data)
        for name in list(left):
            found = float((vectors[name] * products[name]).sum())
            if abs(found - values[name]) <= tolerance * abs(found) or not bool(products[name].any()):
                left.discard(name)
            values[name], vectors[name] = found, _unit(products[name])
        if not left:
            break
    return values


def _chosen(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    known, wanted = dict(model.named_parameters(remove_duplicate=False)), list(names)
    for name in wanted:
        if name not in known:
            raise InputError("no such parameter", where=f"parameter {name!r}", instead="take names from the model")
    if not wanted:
        raise InputError("got none", where="parameters", instead="name at least one")
    return {name: known[name] for name in wanted}


def _listed(batches: Iterable[Any]) -> list[Any]:
    data = list(batches)
    if not data:
        raise InputError("there is no batch", where="batches", instead="give at least one")
    return data


def _signs(parameter: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1).to(parameter)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp(min=1e-30)


def _gradients(
    model: nn.Module, loss: Loss, batches: list[Any], chosen: Mapping[str, nn.Parameter]
) -> Iterator[dict[str, Tensor]]:
    """The loss's gradients on each batch, with their graph."""
    asked = {name: parameter.requires_grad for name, parameter in chosen.items()}
    try:
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        # Fused attention has no second derivative.
        with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for batch in batches:
                value = loss(model, batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not bool(value.isfinite()):
                    raise InputError("it gave no finite number", where="loss", instead="return the batch's mean loss")
                found = torch.autograd.grad(value, list(chosen.values()), create_graph=True, materialize_grads=True)
                yield dict(zip(chosen, found, strict=True))
    finally:
        for name, parameter in chosen.items():
            parameter.requires_grad_(asked[name])
