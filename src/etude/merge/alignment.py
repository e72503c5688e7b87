r"""How the neurons of one layer map onto another's: ground costs, transport plans, and what plans do to weights.

A plan :math:`T` (source neurons by anchor neurons, sum 1) acts on a layer in two ways. What the layer *writes* is
re-expressed with :math:`L = T\,\mathrm{diag}(1/\nu)`, whose columns sum to 1: each anchor neuron is a mean of source
neurons. What it *reads* is re-expressed with :math:`R = \mathrm{diag}(1/\mu)\,T`, whose rows sum to 1: the weight that
a consumer gives to a source neuron is shared out, not multiplied. Both are :math:`nT` for layers of equal size.
"""

import copy
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from etude.core.checks import InputError, UnsupportedModuleError, check_at_least, check_one_of
from etude.core.matching import CONSTANT, transport

__all__ = ["Exact", "GroundCost", "PairMoments", "Sinkhorn", "Solver", "align", "incoming", "outgoing"]

METRICS = ("euclidean", "cosine")
PREPARATIONS = ("standardise", "centre", "unit", "none")
SCALES = ("max", "mean", "median", "log1p", "none")
NORMALISATIONS = ("consistent", "column")
FLOOR = 1e-9
"""Added to deviations before dividing by them, as in the authors' code."""

CHECK_EVERY = 10
SAFE_LOGARITHM = 100.0
"""Scalings beyond exp of this are absorbed into the potentials, long before float64 overflows."""

DOUBLE_ENTRIES = 1 << 25
"""Plans with more entries are solved in the precision of their cost, so that one of 8192 x 8192 still fits."""


@runtime_checkable
class Solver(Protocol):
    """Anything that turns costs into plans: `Exact`, `Sinkhorn`, or your own."""

    def plan(self, cost: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n m"]:
        """A coupling of uniform masses: rows sum to 1/n, columns to 1/m."""
        ...


class PairMoments:
    """What two layers' neurons do together on the same samples, streamed: all that a ground cost needs.

    Args:
        first: number of the source's neurons.
        second: number of the anchor's neurons.
        dtype: of the sums.
        device: where they are kept.

    Each batch is centred by itself and merged by Chan's update, so that large common offsets cost no digits.
    """

    def __init__(
        self, first: int, second: int, *, dtype: torch.dtype = torch.float64, device: torch.device | None = None
    ):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.count = 0
        self.means = [zeros(first), zeros(second)]
        self.squares = [zeros(first), zeros(second)]
        self.products = zeros(first, second)

    @classmethod
    def of(cls, first: Float[Tensor, "samples n"], second: Float[Tensor, "samples m"]) -> "PairMoments":
        """The moments of two whole tables."""
        moments = cls(first.shape[1], second.shape[1], device=first.device)
        moments.update(first.double(), second.double())
        return moments

    def update(self, first: Float[Tensor, "samples n"], second: Float[Tensor, "samples m"]) -> None:
        """Take in the neurons' values on some more samples."""
        tables = [first, second]
        # In the precision of the sums: the mean of a constant is that constant, and what is left of it is zero.
        batch_means = [table.mean(0, dtype=self.products.dtype) for table in tables]
        centred = [table - mean.to(table) for table, mean in zip(tables, batch_means, strict=True)]
        total = self.count + len(first)
        shifts = [mean - old for mean, old in zip(batch_means, self.means, strict=True)]
        weight = self.count * len(first) / total
        for side in (0, 1):
            self.means[side] += shifts[side] * (len(first) / total)
            self.squares[side] += centred[side].square().sum(0).to(shifts[side]) + weight * shifts[side].square()
        self.products += (centred[0].T @ centred[1]).to(self.products)
        self.products.addr_(shifts[0], shifts[1], alpha=weight)
        self.count = total

    def dead(self, side: int) -> Tensor:
        """Which neurons of one side (0 the source, 1 the anchor) never changed."""
        deviation = (self.squares[side] / max(self.count, 1)).sqrt()
        return deviation <= max(CONSTANT, torch.finfo(deviation.dtype).eps) * self.means[side].abs()


@dataclass(frozen=True)
class GroundCost:
    r"""The cost :math:`C_{ij}` of sending source neuron i to anchor neuron j.

    Args:
        metric: ``euclidean`` (the paper's) or ``cosine`` distance between two neurons' values over all samples.
        prepare: of each neuron's values: ``standardise`` (subtract their mean, divide by their deviation),
            ``centre``, ``unit`` (divide by their norm) or ``none``. By default ``standardise`` for activations and
            ``unit`` for weights, as the authors do. A neuron that never changes becomes zero.
        square: whether to square the distances.
        scale: divides the costs, so that a solver's regularisation means the same in every layer: their ``max``
            (the authors' default), ``mean`` or ``median``; ``log1p`` takes log(1 + C) instead; ``none``.
        clip: largest cost after scaling, if any.

    >>> GroundCost(prepare="none").between(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 3.0]])).tolist()
    [[0.33..., 1.0], [0.0, 0.66...]]
    """

    metric: str = "euclidean"
    prepare: str | None = None
    square: bool = False
    scale: str = "max"
    clip: float | None = None

    def __post_init__(self) -> None:
        check_one_of("metric", self.metric, METRICS)
        check_one_of("scale", self.scale, SCALES)
        if self.prepare is not None:
            check_one_of("prepare", self.prepare, PREPARATIONS)
        if self.clip is not None:
            check_at_least("clip", self.clip, 0.0, strict=True)

    def between(
        self, first: Float[Tensor, "samples n"], second: Float[Tensor, "same_samples m"]
    ) -> Float[Tensor, "n m"]:
        """Costs between the columns of two tables that hold the same samples."""
        if len(first) != len(second) or not len(first):
            raise InputError(
                f"{len(first)} samples and {len(second)}", where="tables", instead="show both the same samples"
            )
        return self.of(PairMoments.of(first, second)).to(first.dtype)

    def of(self, moments: PairMoments, *, prepare: str = "standardise") -> Float[Tensor, "n m"]:
        """Costs from moments; ``prepare`` stands in where the ground cost itself leaves it open."""
        cost = self._distances(moments, self.prepare or prepare)
        cost = self._scaled(cost.square() if self.square else cost)
        return cost if self.clip is None else cost.clamp(max=self.clip)

    def _distances(self, moments: PairMoments, prepare: str) -> Tensor:
        """Distances by |a|^2 + |b|^2 - 2ab, which needs no table of samples."""
        inner, squares = moments.products, list(moments.squares)
        if prepare in ("unit", "none"):  # values as they are: put the means back
            inner = inner + moments.count * torch.outer(*moments.means)
            squares = [s + moments.count * m.square() for s, m in zip(squares, moments.means, strict=True)]
            dead = [square <= 0 for square in squares]
        else:
            dead = [moments.dead(0), moments.dead(1)]
        lengths = [square.clamp(min=0).sqrt() for square in squares]
        spread = max(moments.count, 1) ** 0.5
        if prepare == "standardise":
            scales = [length / spread + FLOOR for length in lengths]
        elif prepare == "unit":
            scales = [length + FLOOR for length in lengths]
        else:
            scales = [torch.ones_like(length) for length in lengths]
        inverse = [torch.where(gone, 0.0, 1 / scale) for gone, scale in zip(dead, scales, strict=True)]
        inner = inner * torch.outer(*inverse)
        lengths = [length * each for length, each in zip(lengths, inverse, strict=True)]
        if self.metric == "cosine":
            cosine = inner / torch.outer(*(length.clamp(min=FLOOR) for length in lengths))
            both_dead = torch.outer(*(gone.to(inner) for gone in dead))
            return (1 - cosine - both_dead).clamp(min=0)
        squared = lengths[0].square().unsqueeze(1) + lengths[1].square() - 2 * inner
        return squared.clamp(min=0).sqrt()

    def _scaled(self, cost: Tensor) -> Tensor:
        if self.scale == "log1p":
            return cost.log1p()
        if self.scale == "none":
            return cost
        size = getattr(cost, self.scale)()
        return cost / size if size > 0 else cost


@dataclass(frozen=True)
class Exact:
    """Plans of least cost (earth mover's): an assignment for equal sizes, a network simplex for unequal ones.

    Solved on the CPU, in O(n^3).

    >>> (2 * Exact().plan(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """

    def plan(self, cost: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n m"]:
        """A coupling of uniform masses: rows sum to 1/n, columns to 1/m."""
        _check_finite(cost)
        *batch, rows, columns = cost.shape
        found = [self._one(each) for each in cost.detach().reshape(-1, rows, columns)]
        return torch.stack(found).view(*batch, rows, columns)

    def _one(self, cost: Tensor) -> Tensor:
        if cost.shape[0] != cost.shape[1]:
            return transport(cost)
        rows, columns = linear_sum_assignment(cost.double().cpu().numpy())
        plan = torch.zeros_like(cost)
        plan[torch.from_numpy(rows), torch.from_numpy(np.asarray(columns))] = 1 / len(cost)
        return plan


@dataclass(frozen=True)
class Sinkhorn:
    r"""Soft plans, :math:`\min_T \langle T, C\rangle - \epsilon H(T)`: log domain, batched, on the cost's device.

    Scalings are multiplied into a kernel and absorbed into log-domain potentials before they leave the range of
    floating point, and small regularisations are approached from larger ones: no :math:`\epsilon` underflows. Where
    the cost requires gradients, they flow through the iterations.

    Args:
        regularisation: :math:`\epsilon`, in units of the scaled cost. The authors find .08 best for activations and
            .06 for weights, with costs divided by their maximum.
        steps: at most so many iterations.
        tolerance: stop once the plan's marginals are wrong by less than this in sum.

    Cuturi, Sinkhorn Distances, NeurIPS 2013; Schmitzer, Stabilized Sparse Scaling Algorithms, SISC 2019.

    >>> plan = Sinkhorn(0.1).plan(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> [[round(value, 4) for value in row] for row in plan.tolist()]
    [[0.5, 0.0], [0.0, 0.5]]
    """

    regularisation: float = 0.08
    steps: int = 20_000
    tolerance: float = 1e-7

    def __post_init__(self) -> None:
        check_at_least("regularisation", self.regularisation, 0.0, strict=True)
        check_at_least("steps", self.steps, 1)
        check_at_least("tolerance", self.tolerance, 0.0, strict=True)

    def plan(self, cost: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n m"]:
        """A coupling of uniform masses: rows sum to 1/n, columns to 1/m.

        Raises:
            InputError: if ``steps`` iterations leave the marginals wrong by more than 1e-4 in sum.
        """
        _check_finite(cost)
        double = cost.numel() <= DOUBLE_ENTRIES and cost.device.type != "mps"
        working = cost.to(torch.float64 if double else torch.promote_types(cost.dtype, torch.float32))
        tolerance = max(self.tolerance, 20 * torch.finfo(working.dtype).eps)
        if torch.is_grad_enabled() and cost.requires_grad:
            plan, error = self._unrolled(working, tolerance)
        else:
            with torch.no_grad():
                plan, error = self._scaled(working, tolerance)
        if not error <= 1e-4:
            raise InputError(
                f"after {self.steps} iterations its marginals are wrong by {error:.1e}",
                where=f"Sinkhorn({self.regularisation})",
                instead="raise the regularisation, give more steps, or use Exact()",
            )
        return plan.to(cost.dtype)

    def _unrolled(self, cost: Tensor, tolerance: float) -> tuple[Tensor, float]:
        """Plain log-domain iterations, which autograd can follow."""
        exponent = -cost / self.regularisation
        row, column = _log_masses(exponent)
        right = torch.zeros_like(exponent[..., :1, :])
        for step in range(1, self.steps + 1):
            left = row - torch.logsumexp(exponent + right, -1, keepdim=True)
            right = column - torch.logsumexp(exponent + left, -2, keepdim=True)
            if step % CHECK_EVERY == 0 or step == self.steps:
                plan = (exponent + left + right).exp()
                error = _row_error(plan)
                if error <= tolerance:
                    break
        return plan, error

    def _scaled(self, cost: Tensor, tolerance: float) -> tuple[Tensor, float]:
        """Scalings of a stabilised kernel, at each of a few falling regularisations."""
        potentials = (torch.zeros_like(cost[..., :1]), torch.zeros_like(cost[..., :1, :]))
        for regularisation in _annealed(float(cost.max() - cost.min()), self.regularisation):
            final = regularisation == self.regularisation
            budget, accuracy = (self.steps, tolerance) if final else (20 * CHECK_EVERY, 1e-2)
            exponent = -cost / regularisation
            scaled = tuple(each / regularisation for each in potentials)
            plan, scaled, error = _iterate(exponent, scaled, budget, accuracy)
            potentials = (scaled[0] * regularisation, scaled[1] * regularisation)
        return plan, error


def _annealed(spread: float, regularisation: float) -> list[float]:
    """Regularisations that fall fourfold from a tenth of the costs' spread to the one wanted."""
    levels = [regularisation]
    while levels[-1] * 4 < spread / 10:
        levels.append(levels[-1] * 4)
    return levels[::-1]


def _iterate(
    exponent: Tensor, potentials: tuple[Tensor, ...], budget: int, tolerance: float
) -> tuple[Tensor, tuple[Tensor, ...], float]:
    """Iterations from given potentials (in units of the regularisation) to a plan, its potentials and its error."""
    log_row, log_column = _log_masses(exponent)
    left, right = _log_step(exponent, potentials[1], log_row, log_column)
    kernel = (exponent + left + right).exp_()
    row_mass, column_mass = log_row.exp(), log_column.exp().transpose(-1, -2)
    u, v = torch.ones_like(kernel[..., :1]), torch.ones_like(kernel[..., :1, :]).transpose(-1, -2)
    error = float("inf")
    for _ in range(max(budget // CHECK_EVERY, 1)):
        for _ in range(CHECK_EVERY):
            product = kernel @ v
            u = row_mass / product
            v = column_mass / (kernel.transpose(-1, -2) @ u)
        logs = torch.cat([u, v], -2).log()
        if not bool(torch.isfinite(logs).all()):  # the kernel underflowed: go on from where it was sound
            for _ in range(CHECK_EVERY):
                left, right = _log_step(exponent, right, log_row, log_column)
        elif float(logs.abs().max()) > SAFE_LOGARITHM:
            left, right = left + u.log(), right + v.log().transpose(-1, -2)
        else:
            error = float((u * (kernel @ v) - row_mass).abs().sum((-1, -2)).max())
            if error <= tolerance:
                break
            continue
        kernel = (exponent + left + right).exp_()
        u, v = torch.ones_like(u), torch.ones_like(v)
        error = _row_error(kernel)
        if error <= tolerance:
            break
    plan = kernel.mul_(u).mul_(v.transpose(-1, -2))
    return plan, (left + u.log(), right + v.log().transpose(-1, -2)), error


def _log_step(exponent: Tensor, right: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    left = row - torch.logsumexp(exponent + right, -1, keepdim=True)
    return left, column - torch.logsumexp(exponent + left, -2, keepdim=True)


def _log_masses(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the uniform masses of rows and columns, shaped to broadcast."""
    rows, columns = exponent.shape[-2:]
    row = torch.full_like(exponent[..., :1].detach(), 1 / rows).log()
    return row, torch.full_like(exponent[..., :1, :].detach(), 1 / columns).log()


def _row_error(plan: Tensor) -> float:
    return float((plan.detach().sum(-1) - 1 / plan.shape[-2]).abs().sum(-1).max())


def _check_finite(cost: Tensor) -> None:
    if not bool(torch.isfinite(cost).all()):
        raise InputError(
            "holds a value that is not finite", where="cost", instead="look for the layer whose activations overflow"
        )


def outgoing(plan: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """L, for what a layer writes: the plan with columns that sum to 1.

    >>> outgoing(torch.tensor([[0.25], [0.25], [0.5]])).tolist()
    [[0.25], [0.25], [0.5]]
    """
    return plan / _sums(plan, 0)


def incoming(plan: Float[Tensor, "n m"], normalisation: str = "consistent") -> Float[Tensor, "n m"]:
    """R, for what a layer reads: the plan with rows that sum to 1.

    Args:
        plan: source neurons by anchor neurons.
        normalisation: ``column`` gives L here too, as published; for layers of unequal size activations then come
            out scaled by the ratio of the sizes.

    >>> incoming(torch.tensor([[0.25], [0.25], [0.5]])).tolist()
    [[1.0], [1.0], [1.0]]
    """
    return outgoing(plan) if normalisation == "column" else plan / _sums(plan, 1)


def _sums(plan: Tensor, axis: int) -> Tensor:
    return plan.sum(axis, keepdim=True).clamp(min=torch.finfo(plan.dtype).tiny)


def align(
    layer: nn.Module,
    before: Float[Tensor, "inputs anchor_inputs"] | None,
    after: Float[Tensor, "outputs anchor_outputs"] | None,
    *,
    normalisation: str = "consistent",
) -> nn.Module:
    r"""Re-express one layer in an anchor's neurons: :math:`W'' = L^\top W R`, :math:`b'' = L^\top b`; a new layer.

    Args:
        layer: a linear layer or an ungrouped convolution, whose channels are the neurons.
        before: plan between the neurons it reads and the anchor's; None where they are the same (raw inputs).
        after: plan between the neurons it writes and the anchor's; None where they are the same (classes).
        normalisation: ``consistent`` or, as published, ``column``.

    Raises:
        InputError: if a plan does not fit the layer.
        UnsupportedModuleError: for another kind of layer.

    >>> swap = torch.tensor([[0.0, 0.5], [0.5, 0.0]])
    >>> layer = nn.Linear(2, 2)
    >>> bool((align(layer, swap, swap).weight == layer.weight.flip(0, 1)).all())
    True
    """
    check_one_of("normalisation", normalisation, NORMALISATIONS)
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or getattr(layer, "groups", 1) != 1:
        raise UnsupportedModuleError("", layer, "it is no linear layer or ungrouped convolution")
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    for name, plan, size in (("before", before, weight.shape[1]), ("after", after, weight.shape[0])):
        if plan is not None and plan.shape[0] != size:
            raise InputError(
                f"{plan.shape[0]} rows for {size} neurons", where=name, instead="give source neurons by anchor neurons"
            )
    if before is not None:
        weight = torch.einsum("oi...,ij->oj...", weight, incoming(before, normalisation).to(weight))
    if after is not None:
        weight = torch.einsum("oi...,op->pi...", weight, outgoing(after).to(weight))
        bias = None if bias is None else bias @ outgoing(after).to(weight)
    return _resized(layer, weight, bias)


def _resized(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of ``layer`` with other weights, of other widths."""
    aligned = copy.deepcopy(layer)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(aligned, name, nn.Parameter(value.clone(), layer.get_parameter(name).requires_grad))
    names = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
    for name, size in zip(names, weight.shape, strict=False):
        setattr(aligned, name, size)
    return aligned
