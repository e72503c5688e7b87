r"""Mixed precision: how many bits each layer gets under a budget of size, operations or measured latency.

`allocate_bits` solves it exactly as an integer program (HAWQ-V3), `pareto_front` finds the best for every size at once
(ZeroQ), `evolve_bits` searches by a score of your own, in the place of reinforcement learning (HAQ), and `SearchedBits`
learns the choice with the weights (DNAS).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Integer
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from etude.compress.quantize.granularity import PER_TENSOR, Granularity
from etude.compress.quantize.histogram import Histogram
from etude.compress.quantize.model import quantized_layers
from etude.compress.quantize.schemes import Scheme
from etude.compress.quantize.sensitivity import Sensitivity, channelwise
from etude.core.checks import InputError, check_at_least, check_fraction

__all__ = [
    "Allocation",
    "SearchedBits",
    "SearchedBitsQuantizer",
    "allocate_bits",
    "evolve_bits",
    "expected_bits",
    "pareto_front",
]


@dataclass(frozen=True)
class Allocation:
    """Bits for every layer.

    Attributes:
        bits: by path.
        cost: the sum of the layers' sensitivities.
        size: of all weights' codes, in bits.
    """

    bits: Mapping[str, int]
    cost: float
    size: float

    def overrides(self, scheme: Callable[[int], Scheme] = channelwise) -> dict[str, Scheme]:
        """Schemes by path, for ``quantize(model, ..., overrides=allocation.overrides())``."""
        return {path: scheme(bits) for path, bits in self.bits.items()}


def allocate_bits(
    table: Sensitivity,
    *,
    mean_bits: float | None = None,
    operations: tuple[Mapping[str, int], float] | None = None,
    latency: tuple[Float[Tensor, "layers bits"], float] | None = None,
    activation_bits: int | None = None,
) -> Allocation:
    r"""The bits of least total cost, :math:`\min \sum_i \Omega_i(b_i)`, under one or several budgets, solved exactly.

    Args:
        table: from `layer_sensitivity`.
        mean_bits: at most so many bits a weight, on average over all weights.
        operations: multiplications by path (`multiplications`) and the most bit operations,
            :math:`\sum_i \text{MAC}_i\, b^w_i\, b^a_i`.
        latency: seconds by layer and bits (`latencies`), and the most seconds.
        activation_bits: :math:`b^a` of every layer; that of its weights where None.

    Raises:
        InputError: without a budget, or for one that even the fewest bits exceed.

    Yao et al., HAWQ-V3: Dyadic Neural Network Quantization, ICML 2021.

    >>> costs = torch.tensor([[9.0, 1.0], [4.0, 3.0]])
    >>> table = Sensitivity(("a", "b"), (2, 8), costs, torch.tensor([10.0, 10.0]), "trace")
    >>> dict(allocate_bits(table, mean_bits=5).bits)
    {'a': 8, 'b': 2}
    """
    rows: list[tuple[str, np.ndarray, float]] = []
    bits = np.array(table.bits, dtype=float)
    weights = table.weights.double().numpy()
    if mean_bits is not None:
        check_at_least("mean_bits", mean_bits, 0.0, strict=True)
        rows.append(("mean_bits", np.outer(weights, bits) / weights.sum(), mean_bits))
    if operations is not None:
        counts, most = operations
        missing = [path for path in table.layers if path not in counts]
        if missing:
            raise InputError(f"got no count for {missing}", where="operations", instead="give multiplications(model)")
        with_inputs = bits * (bits if activation_bits is None else activation_bits)
        used = np.outer([counts[path] for path in table.layers], with_inputs)
        rows.append(("operations", used / most, 1.0))
    if latency is not None:
        seconds, longest = latency
        if seconds.shape != table.costs.shape:
            raise InputError(
                f"got shape {tuple(seconds.shape)}", where="latency", instead=f"give {tuple(table.costs.shape)}"
            )
        rows.append(("latency", seconds.double().numpy() / longest, 1.0))
    if not rows:
        raise InputError("got none", where="budget", instead="give mean_bits, operations or latency")
    for name, used, most in rows:
        least = used.min(1).sum()
        if least > most * (1 + 1e-9):
            raise InputError(
                f"{least / most:.3g} times the budget is needed at least",
                where=name,
                instead="allow more, or fewer bits",
            )
    return _of(table, _program(table.costs.double().numpy(), rows))


def _program(costs: np.ndarray, rows: Sequence[tuple[str, np.ndarray, float]]) -> np.ndarray:
    """The column chosen for each layer: one binary variable for each layer and number of bits."""
    layers, choices = costs.shape
    one_each = np.kron(np.eye(layers), np.ones(choices))
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints += [LinearConstraint(used.reshape(1, -1), -np.inf, most * (1 + 1e-9)) for _, used, most in rows]
    # Costs span many decades: in units of the largest the solver's tolerances would hide the small ones.
    scale = float(np.median(costs[costs > 0])) if (costs > 0).any() else 1.0
    solved = milp(
        costs.reshape(-1) / scale,
        constraints=constraints,
        bounds=Bounds(0, 1),
        integrality=1,
        options={"mip_rel_gap": 0},
    )
    if solved.x is None:
        raise InputError(f"no solution: {solved.message}", where="budget", instead="allow more, or fewer bits")
    return solved.x.reshape(layers, choices).argmax(1)


def _of(table: Sensitivity, columns: Sequence[int] | np.ndarray) -> Allocation:
    bits = {path: table.bits[int(column)] for path, column in zip(table.layers, columns, strict=True)}
    rows = torch.arange(len(table.layers))
    cost = float(table.costs[rows, torch.as_tensor(columns)].double().sum())
    size = sum(float(count) * bits[path] for path, count in zip(table.layers, table.weights, strict=True))
    return Allocation(bits, cost, size)


def pareto_front(table: Sensitivity, *, resolution: int = 1000) -> list[Allocation]:
    """For every size the allocation of least cost, those that a smaller one beats left out; ascending in size.

    Layer by layer, of all partial allocations whose size falls into the same of ``resolution`` steps only the
    cheapest is kept (dynamic programming; exact where no two fall together).

    Args:
        table: from `layer_sensitivity`.
        resolution: steps of size between the smallest and the largest.

    Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework, CVPR 2020, section 3.2.

    >>> costs = torch.tensor([[9.0, 1.0], [4.0, 3.0]])
    >>> table = Sensitivity(("a", "b"), (2, 8), costs, torch.tensor([10.0, 10.0]), "divergence")
    >>> [(each.size, each.cost) for each in pareto_front(table)]
    [(40.0, 13.0), (100.0, 5.0), (160.0, 4.0)]
    """
    check_at_least("resolution", resolution, 1)
    counts, bits = table.weights.double().numpy(), np.array(table.bits, dtype=float)
    step = max(counts.sum() * (bits.max() - bits.min()) / resolution, 1e-9)
    sizes, costs, chosen = np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=np.int64)
    for count, row in zip(counts, table.costs.double().numpy(), strict=True):
        sizes = (sizes[:, None] + count * bits).reshape(-1)
        costs = (costs[:, None] + row).reshape(-1)
        chosen = np.hstack([np.repeat(chosen, len(bits), 0), np.tile(np.arange(len(bits)), len(chosen))[:, None]])
        order = np.lexsort((sizes, costs))
        _, first = np.unique(np.round(sizes[order] / step).astype(np.int64), return_index=True)
        kept = order[first]
        kept = kept[np.lexsort((costs[kept], sizes[kept]))]
        best = np.minimum.accumulate(costs[kept])
        better = np.concatenate([[True], costs[kept][1:] < best[:-1]])
        sizes, costs, chosen = sizes[kept][better], costs[kept][better], chosen[kept][better]
    return [_of(table, columns) for columns in chosen]


def evolve_bits(
    table: Sensitivity,
    score: Callable[[Mapping[str, int]], float],
    *,
    mean_bits: float,
    population: int = 50,
    generations: int = 20,
    mutation: float = 0.1,
    generator: torch.Generator | None = None,
) -> Allocation:
    """Search bits by evolution for the highest score, e.g. the accuracy of the quantised model.

    The better half of each generation survives; children mix two parents layer by layer, mutate, and have bits taken
    off layers at random until they keep the budget. The exact solution for ``table`` is among the first generation.

    Args:
        table: the choices, and the sensitivities that the first generation starts from.
        score: of bits by path; higher is better.
        mean_bits: at most so many bits a weight, on average.
        population: of each generation.
        generations: so many.
        mutation: chance that a layer's bits are drawn anew.
        generator: CPU generator; seed 0 if not given.

    >>> costs = torch.tensor([[9.0, 1.0], [4.0, 3.0]])
    >>> table = Sensitivity(("a", "b"), (2, 8), costs, torch.tensor([10.0, 10.0]), "trace")
    >>> dict(evolve_bits(table, lambda bits: bits["b"] - bits["a"], mean_bits=5).bits)
    {'a': 2, 'b': 8}
    """
    check_at_least("population", population, 2)
    check_at_least("generations", generations, 1)
    check_fraction("mutation", mutation, zero=True, one=True)
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    start = allocate_bits(table, mean_bits=mean_bits)
    first = torch.tensor([table.bits.index(start.bits[path]) for path in table.layers])
    genes = torch.randint(len(table.bits), (population, len(table.layers)), generator=draws)
    genes = torch.cat([first.unsqueeze(0), _within(table, genes, mean_bits, draws)[1:]])
    known: dict[tuple[int, ...], float] = {}
    for generation in range(generations):
        scores = torch.tensor([_scored(table, each, score, known) for each in genes])
        order = scores.argsort(descending=True, stable=True)
        parents = genes[order[: max(population // 2, 1)]]
        if generation + 1 == generations:
            break
        count = population - len(parents)
        pairs = torch.randint(len(parents), (2, count), generator=draws)
        mixed = torch.rand(count, len(table.layers), generator=draws) < 0.5
        children = torch.where(mixed, parents[pairs[0]], parents[pairs[1]])
        fresh = torch.randint(len(table.bits), children.shape, generator=draws)
        children = torch.where(torch.rand(children.shape, generator=draws) < mutation, fresh, children)
        genes = torch.cat([parents, _within(table, children, mean_bits, draws)])
    return _of(table, parents[0].tolist())


def _within(table: Sensitivity, genes: Tensor, mean_bits: float, generator: torch.Generator) -> Tensor:
    """Lower layers chosen at random by one step until each row keeps the budget."""
    bits, genes = torch.tensor(table.bits, dtype=torch.float64), genes.clone()
    weights = table.weights.double()
    while bool((over := (bits[genes] @ weights) > mean_bits * weights.sum() * (1 + 1e-9)).any()):
        chance = torch.rand(genes.shape, generator=generator) * (genes > 0)
        chosen = chance.argmax(1, keepdim=True)
        genes.scatter_add_(1, chosen, -over.long().unsqueeze(1))
    return genes


def _scored(
    table: Sensitivity,
    genes: Tensor,
    score: Callable[[Mapping[str, int]], float],
    known: dict[tuple[int, ...], float],
) -> float:
    key = tuple(genes.tolist())
    if key not in known:
        known[key] = float(score({path: table.bits[g] for path, g in zip(table.layers, key, strict=True)}))
    return known[key]


@dataclass(frozen=True)
class SearchedBits:
    r"""A scheme that learns which of several to be: a mixture whose weights are drawn by Gumbel softmax (DNAS).

    In training the result is :math:`\sum_k m_k Q_k(x)` with m a relaxed draw by learned scores; in evaluation it is the
    quantizer of the highest score. Add `expected_bits` to the loss to make bits cost something.

    Args:
        schemes: candidates, e.g. ``tuple(map(channelwise, (2, 4, 8)))``.
        temperature: of the draws; the paper anneals it from 5 (set ``temperature`` of the quantizers).

    Wu et al., Mixed Precision Quantization of ConvNets via Differentiable Neural Architecture Search, 2018.
    """

    schemes: tuple[Scheme, ...]
    temperature: float = 5.0
    granularity: Granularity = field(default=PER_TENSOR, init=False)

    def __post_init__(self) -> None:
        check_at_least("number of schemes", len(self.schemes), 2)
        check_at_least("temperature", self.temperature, 0.0, strict=True)

    def fit(
        self,
        values: Tensor | Histogram,
        *,
        importance: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> "SearchedBitsQuantizer":
        """The quantizer whose candidates suit ``values``; ``generator`` draws the mixtures."""
        fitted = [scheme.fit(values, importance=importance, generator=generator) for scheme in self.schemes]
        return SearchedBitsQuantizer(fitted, self.temperature, generator)


class SearchedBitsQuantizer(nn.Module):
    """A mixture of quantizers in training, one of them otherwise; made by `SearchedBits`."""

    def __init__(self, quantizers: Sequence[nn.Module], temperature: float, generator: torch.Generator | None = None):
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        self.scores = nn.Parameter(torch.zeros(len(quantizers)))
        self.temperature, self.generator = temperature, generator

    def chosen(self) -> nn.Module:
        """The candidate of the highest score."""
        return self.quantizers[int(self.scores.argmax())]

    def mean_bits(self) -> Float[Tensor, ""]:
        """The candidates' bits, averaged by probability."""
        bits = torch.tensor([float(each.code_bits()) for each in self.quantizers]).to(self.scores)  # type: ignore[operator]
        return self.scores.softmax(0) @ bits

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """A mixture of all candidates' values, or the best one's."""
        if not self.training:
            return self.chosen()(x)
        uniform = torch.rand(self.scores.shape, generator=self.generator).clamp(1e-9, 1 - 1e-7).to(self.scores)
        shares = ((self.scores - (-uniform.log()).log()) / self.temperature).softmax(0)
        return (torch.stack([each(x) for each in self.quantizers], -1) * shares.to(x.dtype)).sum(-1)

    def codes(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "..."]:
        """The best candidate's codes."""
        return self.chosen().codes(x)  # type: ignore[operator]

    def values(self, codes: Integer[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What codes stand for."""
        return self.chosen().values(codes)  # type: ignore[operator]

    def code_bits(self) -> int:
        """Bits of the best candidate's codes."""
        return self.chosen().code_bits()  # type: ignore[operator]

    def codes_for(self, count: int) -> int:
        """How many codes stand for ``count`` values."""
        return self.chosen().codes_for(count)  # type: ignore[operator]

    def overhead_bits(self) -> int:
        """Bits of what the best candidate stores besides codes."""
        return self.chosen().overhead_bits()  # type: ignore[operator]

    def plain(self) -> nn.Module:
        """The best candidate."""
        best = self.chosen()
        return best.plain() if hasattr(best, "plain") else best  # type: ignore[operator]


def expected_bits(model: nn.Module) -> Float[Tensor, ""]:
    """The mean number of bits a weight over all layers with `SearchedBits` weights; differentiable in their scores.

    >>> from etude.compress.quantize import Uniform, quantize
    >>> model = quantize(nn.Sequential(nn.Linear(4, 2)), SearchedBits((Uniform(2), Uniform(8))))
    >>> expected_bits(model).item()
    5.0
    """
    layers = [
        (layer.master.numel(), layer.weight_quantizer)
        for layer in quantized_layers(model).values()
        if isinstance(layer.weight_quantizer, SearchedBitsQuantizer)
    ]
    if not layers:
        raise InputError("has no weights whose bits are searched", where="model", instead="use SearchedBits(schemes)")
    total = torch.stack([count * quantizer.mean_bits() for count, quantizer in layers]).sum()
    return total / sum(count for count, _ in layers)
