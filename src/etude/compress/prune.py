r"""Lottery tickets: sparse sub-networks that train as well as the network they were found in.

Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR 2019
(arXiv 1803.03635). Train a network, remove the smallest weights, put the survivors back to their initial values,
and repeat: :math:`f(x;\, m \odot \theta_0)`.

Masks are unstructured: they make a network smaller on disk and in theory, not faster on dense hardware.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from etude.core.checks import InputError, check_at_least, check_fraction, check_one_of
from etude.core.params import bare_name, bare_state, mask_parameters, owners

__all__ = ["Masks", "Ticket", "lottery_ticket", "magnitude_prune", "prunable", "random_masks_like"]

SCOPES = ("layer", "global")
STRATEGIES = ("reset", "continue")
STARTS = ("original", "reinit", "survivors", "sign", "noise")
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Masks(Mapping[str, Tensor]):
    """Which weights of a network are kept: a boolean tensor for each pruned parameter, by its name.

    Args:
        kept: for each name, True where the weight stays.

    >>> masks = Masks({"weight": torch.tensor([[True, False], [True, True]])})
    >>> masks.remaining, masks.degrees("weight")[0].tolist()
    (0.75, [2, 1])
    """

    def __init__(self, kept: Mapping[str, Bool[Tensor, "..."]]):
        for name, mask in kept.items():
            if mask.dtype is not torch.bool:
                raise InputError(f"got {mask.dtype}", where=f"mask {name!r}", instead="give a boolean tensor")
        self._kept = dict(kept)

    @classmethod
    def ones(cls, model: nn.Module, names: Sequence[str] | None = None) -> "Masks":
        """Masks that keep every weight of the parameters ``names`` (of all `prunable` ones)."""
        parameters = dict(model.named_parameters())
        chosen = prunable(model) if names is None else names
        return cls({name: torch.ones_like(parameters[name], dtype=torch.bool) for name in chosen})

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def remaining(self) -> float:
        """Share of the masked parameters' weights that is kept: the paper's P_m."""
        return sum(self.counts().values()) / max(sum(mask.numel() for mask in self.values()), 1)

    def counts(self) -> dict[str, int]:
        """Weights kept, by name."""
        return {name: int(mask.sum()) for name, mask in self.items()}

    def degrees(self, name: str) -> tuple[Int64[Tensor, "inputs"], Int64[Tensor, "outputs"]]:
        """Connections kept at each input and at each output of one layer (paper, appendix F.6)."""
        table = self[name].flatten(2).sum(2) if self[name].dim() > 2 else self[name].long()
        return table.sum(0), table.sum(1)

    def apply(self, model: nn.Module) -> nn.Module:
        """A masked copy of ``model``: masked-out weights are zero in every forward and get no gradient.

        The masks are parametrizations, part of the ``state_dict``; optimisers cannot move a masked-out weight.
        """
        return mask_parameters(model, self)

    def state_dict(self) -> dict[str, Tensor]:
        """The masks as tensors by name, e.g. for safetensors; ``Masks(state)`` gives them back."""
        return {name: mask.clone() for name, mask in self.items()}


@dataclass(frozen=True)
class Ticket:
    """A sub-network found by pruning: a mask, the weights it starts from, and how it trained.

    Args:
        masks: the weights kept.
        initial: parameters and buffers at the start (or at the point rewound to), by name.
        trained: parameters and buffers after training, masked-out weights zero.
        metrics: what the user's ``train`` returned.
        round: how many times it was pruned; 0 is the dense network.
    """

    masks: Masks
    initial: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    metrics: Any
    round: int
    _model: nn.Module = field(repr=False)

    def instantiate(
        self,
        start: str = "original",
        *,
        generator: torch.Generator | None = None,
        noise: float = 0.5,
        initialise: Callable[[nn.Module, torch.Generator], Any] | None = None,
    ) -> nn.Module:
        """A fresh network under the ticket's mask, to train.

        Args:
            start: where pruned parameters start: ``original``, the values the ticket was found from;
                ``reinit``, a fresh draw from their distribution; ``survivors``, draws from the layer's surviving
                initial values (appendix F.3); ``sign``, a fresh draw with the original signs; ``noise``, the
                original plus Gaussian noise (F.7). All other parameters and buffers start as they did.
            generator: CPU generator; needed for all but ``original``.
            noise: for ``noise``, its standard deviation in units of the layer's at the start.
            initialise: for ``reinit`` and ``sign``, draws a network's initial weights in place. Without one,
                weights are drawn from a Gaussian of the layer's initial mean and standard deviation, which is
                the original distribution where that was Gaussian.
        """
        check_one_of("start", start, STARTS)
        check_at_least("noise", noise, 0.0)
        network = copy.deepcopy(self._model)
        network.load_state_dict(self.initial)
        if start == "original":
            return self.masks.apply(network)
        if generator is None:
            raise InputError("got none", where="generator", instead=f"start={start!r} draws from a torch.Generator")
        fresh = None
        if initialise is not None:
            fresh = copy.deepcopy(self._model)
            initialise(fresh, generator)
        parameters, drawn = dict(network.named_parameters()), dict(fresh.named_parameters()) if fresh else {}
        with torch.no_grad():
            for name, mask in self.masks.items():
                origin = parameters[name].detach().clone()
                redraw = drawn.get(name, _gaussian_like(origin, generator))
                parameters[name].copy_(_start(start, origin, mask, redraw, noise, generator))
        return self.masks.apply(network)

    def prune(self, fraction: float, *, scope: str = "layer", output_factor: float = 0.5) -> Masks:
        """Masks without a further ``fraction`` of the surviving weights, the smallest after training.

        On the dense network's ticket (round 0) this is one-shot pruning. To prune at initialisation (F.4), give
        `magnitude_prune` the ticket's ``initial`` weights.
        """
        return magnitude_prune(self.trained, self.masks, fraction, scope=scope, output_factor=output_factor)

    def movement(self, name: str) -> tuple[Float[Tensor, "kept"], Float[Tensor, "kept"]]:
        """How far the surviving weights of one layer moved, and how far away from zero (appendix F.5)."""
        mask = self.masks[name]
        before, after = self.initial[name][mask], self.trained[name][mask]
        return (after - before).abs(), after.abs() - before.abs()

    def to_sparse(self) -> dict[str, Tensor]:
        """The trained weights of the pruned layers as CSR matrices, ``(outputs, inputs...)`` flattened to two axes."""
        return {name: self.trained[name].flatten(1).to_sparse_csr() for name in self.masks}


def prunable(model: nn.Module) -> list[str]:
    """The parameters pruned by default: weight matrices and filters.

    Biases, normalisation and embeddings, and weights tied to an embedding, are left out (the paper never prunes
    biases or normalisation).

    Raises:
        InputError: if there are none.

    >>> prunable(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2)))
    ['0.weight', '3.weight']
    """
    names = [
        name
        for name, places in owners(model).items()
        if not any(isinstance(module, (*NORMS, nn.Embedding, nn.EmbeddingBag)) for module, _ in places)
        and places[0][0]._parameters[places[0][1]].dim() >= 2  # type: ignore[union-attr]
        and "position" not in name
        and "token" not in name.rpartition(".")[2]
    ]
    if not names:
        raise InputError("no weight matrix", where="model", instead="name the parameters to prune")
    return names


def magnitude_prune(
    weights: Mapping[str, Tensor],
    masks: Masks,
    fraction: float,
    *,
    scope: str = "layer",
    output_factor: float = 0.5,
    rates: Mapping[str, float] | None = None,
) -> Masks:
    """Remove the smallest of the surviving weights.

    Exactly ``round(fraction * k)`` of a layer's (or, globally, all) k surviving weights go, the smallest in
    magnitude; of equals the first by index. A removed weight never comes back.

    Args:
        weights: values by name, for the masks' names.
        masks: what survives so far.
        fraction: share of the survivors to remove, in (0, 1); 0.2 in the paper.
        scope: ``layer``, each layer by itself, or ``global``, one threshold over all.
        output_factor: factor on the rate of the last layer under scope ``layer``; half in the paper.
        rates: other rates for parameters whose names match a glob; a rate may be 0.

    Returns:
        New masks.

    >>> masks = Masks({"weight": torch.ones(1, 5, dtype=torch.bool)})
    >>> weights = {"weight": torch.tensor([[3.0, -0.5, 1.0, -2.0, 4.0]])}
    >>> magnitude_prune(weights, masks, 0.4, output_factor=1)["weight"].tolist()
    [[True, False, False, True, True]]
    """
    check_fraction("fraction", fraction)
    check_one_of("scope", scope, SCOPES)
    plan = _rates(list(masks), fraction, scope, output_factor, rates or {})
    if missing := [name for name in masks if name not in weights]:
        raise InputError(f"no weights for {missing[0]!r}", where="weights", instead="give a value for every mask")
    if scope == "layer":
        kept = {name: _keep_largest(weights[name], mask, plan[name]) for name, mask in masks.items()}
        return Masks(kept)
    pruned = {name: mask for name, mask in masks.items() if plan[name]}
    flat = torch.cat([weights[name].reshape(-1) for name in pruned])
    survivors = torch.cat([mask.reshape(-1) for mask in pruned.values()])
    parts = _keep_largest(flat, survivors, fraction).split([mask.numel() for mask in pruned.values()])
    shaped = {name: part.view_as(masks[name]) for name, part in zip(pruned, parts, strict=True)}
    return Masks({name: shaped.get(name, mask) for name, mask in masks.items()})


def random_masks_like(masks: Masks, generator: torch.Generator) -> Masks:
    """Random masks that keep as many weights of every layer as ``masks`` do (the paper's random sparsity).

    >>> masks = Masks({"weight": torch.tensor([[True, False, True]])})
    >>> random_masks_like(masks, torch.Generator().manual_seed(0)).counts()
    {'weight': 2}
    """
    drawn = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator)[: int(mask.sum())]
        flat = torch.zeros(mask.numel(), dtype=torch.bool)
        flat[order] = True
        drawn[name] = flat.view(mask.shape).to(mask.device)
    return Masks(drawn)


def lottery_ticket(
    model: nn.Module,
    train: Callable[[nn.Module], Any],
    *,
    rounds: int = 15,
    fraction: float = 0.2,
    scope: str = "layer",
    output_factor: float = 0.5,
    rates: Mapping[str, float] | None = None,
    names: Sequence[str] | None = None,
    rewind: Callable[[nn.Module], Any] | None = None,
    strategy: str = "reset",
    on_round: Callable[[Ticket], Any] | None = None,
) -> list[Ticket]:
    """Find winning tickets by iterative magnitude pruning.

    Train; remove the smallest of the surviving weights; put the survivors back to their initial values; repeat
    (the paper's strategy 1). Everything else starts each round as it first did: biases, normalisation statistics,
    and the optimiser, which ``train`` makes anew.

    Args:
        model: the network at its initialisation; it is left as it is.
        train: your training loop: trains the network it is given, in place, and returns metrics. Make the
            optimiser, schedule and data order inside, so that every round begins alike.
        rounds: how often to prune.
        fraction: share of the surviving weights removed a round; 0.2 in the paper.
        scope: ``layer`` (LeNet, Conv-2/4/6 in the paper) or ``global`` (VGG-19, ResNet-18).
        output_factor: factor on the last layer's rate under scope ``layer``; half in the paper.
        rates: other rates for parameters whose names match a glob, e.g. ``{"features.*": 0.1}``; 0 never prunes.
        names: the parameters to prune; `prunable` ones by default.
        rewind: trains the network for the first iterations; tickets are then put back to that point rather than to
            the initialisation (Frankle et al., 2020: deep networks need it).
        strategy: ``reset``, or ``continue``: prune and train on from the trained weights, never resetting within
            the search (the paper's strategy 2, worse at every size).
        on_round: called with each ticket as it is found.

    Returns:
        ``rounds + 1`` tickets, from the dense network's on.

    Raises:
        InputError: before any training, for unusable arguments or a rate that would empty a layer; after a round,
            if ``train`` returned nothing, trained another network, or changed this one's structure.

    Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019.

    >>> def train(network):
    ...     optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    ...     network(torch.ones(4, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     return {"loss": 0.0}
    >>> tickets = lottery_ticket(nn.Linear(8, 8), train, rounds=2, output_factor=1)
    >>> [ticket.masks.counts()["weight"] for ticket in tickets]
    [64, 51, 41]
    """
    check_one_of("strategy", strategy, STRATEGIES)
    check_at_least("rounds", rounds, 1)
    check_fraction("fraction", fraction)
    check_one_of("scope", scope, SCOPES)
    masks = Masks.ones(model, names)
    _check_survival(masks, rounds, fraction, scope, _rates(list(masks), fraction, scope, output_factor, rates or {}))
    origin = copy.deepcopy(model)
    if rewind is not None:
        rewind(origin)
    initial = bare_state(origin)
    tickets: list[Ticket] = []
    network = masks.apply(origin)
    for index in range(rounds + 1):
        if index:
            last = tickets[-1]
            masks = magnitude_prune(
                last.trained, last.masks, fraction, scope=scope, output_factor=output_factor, rates=rates
            )
            network = masks.apply(origin if strategy == "reset" else _holding(origin, last.trained))
        trained, metrics = _train(train, network, origin)
        tickets.append(Ticket(masks, initial, trained, metrics, index, origin))
        if on_round is not None:
            on_round(tickets[-1])
    return tickets


def _train(train: Callable[[nn.Module], Any], network: nn.Module, origin: nn.Module) -> tuple[dict[str, Tensor], Any]:
    before = bare_state(network)
    metrics = train(network)
    after = bare_state(network)
    if metrics is None:
        raise InputError("returned None", where="train", instead="train the given network in place, return metrics")
    if {n: v.shape for n, v in after.items()} != {n: v.shape for n, v in before.items()}:
        raise InputError("changed the network's structure", where="train", instead="change its values only")
    parameters = [bare_name(name) for name, _ in network.named_parameters()]
    if all(torch.equal(before[name], after[name]) for name in parameters):
        raise InputError(
            "left the network's weights as they were", where="train", instead="train the network it is given"
        )
    return after, metrics


def _holding(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    network = copy.deepcopy(model)
    network.load_state_dict(state)
    return network


def _rates(
    names: list[str], fraction: float, scope: str, output_factor: float, overrides: Mapping[str, float]
) -> dict[str, float]:
    """The share removed from each layer a round."""
    check_fraction("output_factor", output_factor, zero=True, one=True)
    plan = dict.fromkeys(names, fraction)
    if scope == "layer":
        plan[names[-1]] = fraction * output_factor
    for pattern, rate in overrides.items():
        check_fraction(f"rates[{pattern!r}]", rate, zero=True)
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise InputError("matches no pruned parameter", where=f"rates[{pattern!r}]", instead=f"names are {names}")
        if scope == "global" and rate not in (0, fraction):
            raise InputError(
                f"got {rate}", where=f"rates[{pattern!r}]", instead="under scope='global' a rate can only be 0"
            )
        plan |= dict.fromkeys(matched, rate)
    return plan


def _check_survival(masks: Masks, rounds: int, fraction: float, scope: str, plan: Mapping[str, float]) -> None:
    """Refuse a schedule that would empty a layer before any training is spent on it."""
    if scope == "global":
        return  # how a global threshold falls is known only after training
    for name, mask in masks.items():
        left = mask.numel()
        for index in range(1, rounds + 1):
            left -= round(plan[name] * left)
            if left == 0:
                raise InputError(
                    f"layer {name!r} would keep 0 of {mask.numel()} weights at round {index}",
                    where="rounds",
                    instead="use scope='global' or a lower rate",
                )


def _keep_largest(weights: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """``mask`` without the ``round(fraction * k)`` smallest of its k survivors; selection, not sorting."""
    survivors = mask.reshape(-1).nonzero().squeeze(1)
    remove = round(fraction * len(survivors))
    if not remove:
        return mask.clone()
    magnitudes = weights.detach().reshape(-1)[survivors].abs()
    threshold = magnitudes.kthvalue(remove).values
    below, equal = magnitudes < threshold, magnitudes == threshold
    # Of weights that equal the threshold, the first by index go, as many as are still to be removed.
    gone = below | (equal & (equal.cumsum(0) <= remove - below.sum()))
    kept = mask.reshape(-1).clone()
    kept[survivors[gone]] = False
    return kept.view_as(mask)


def _gaussian_like(origin: Tensor, generator: torch.Generator) -> Tensor:
    draw = torch.randn(origin.shape, generator=generator).to(origin)
    return draw * origin.std() + origin.mean()


def _start(start: str, origin: Tensor, mask: Tensor, fresh: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if start == "reinit":
        return fresh
    if start == "sign":
        return fresh.abs() * origin.sign()
    if start == "survivors":
        pool = origin[mask]
        chosen = torch.randint(len(pool), (origin.numel(),), generator=generator).to(pool.device)
        return pool[chosen].view_as(origin)
    draw = torch.randn(origin.shape, generator=generator).to(origin)
    return origin + noise * origin.std() * draw
