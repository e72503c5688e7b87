"""Lottery tickets: several searches as one stack, and selection of the smallest weights, against the obvious ways.

``python benchmarks/lottery_ticket.py`` compares

- ten searches of ten rounds, stacked, with a loop over seeds and rounds that uses `torch.nn.utils.prune`: LeNet-300-100
  on images of MNIST's size, where on a CPU arithmetic takes the time, and of 8 by 8 pixels, where calls do; once with
  Adam as one writes it (``torch.optim.Adam(parameters, lr)``) in the loop, and once with the fused one that ours uses;
- one pruning step on a tensor of 100 million weights with sorting, and with `torch.nn.utils.prune.l1_unstructured`.
"""

from collections.abc import Callable
from functools import partial

import torch
from side_by_side import Comparison, compare, write
from torch import Tensor, nn
from torch.nn.utils import prune

from etude.compress import Masks, lottery_ticket, magnitude_prune
from etude.core.replicas import Replicas
from etude.core.training import fit
from etude.models import lenet_300_100

SEEDS, ROUNDS, STEPS, BATCH = range(10), 10, 20, 60
FRACTION, OUTPUT_FACTOR = 0.2, 0.5
WEIGHTS = 100_000_000

adam = partial(torch.optim.Adam, lr=1.2e-3)
fused_adam = partial(adam, fused=True)


def data(inputs: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(2_000, inputs, generator=draw), torch.randint(10, (2_000,), generator=draw)


def network(seed: int, inputs: int) -> nn.Module:
    return lenet_300_100(torch.Generator().manual_seed(seed), inputs=inputs)


def stacked(rows: Tensor, targets: Tensor) -> list[dict[str, Tensor]]:
    """All searches at once, each on its own order of the data."""

    def train(model: nn.Module) -> str:
        orders = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        fit(model, rows, targets, optimizer=fused_adam, steps=STEPS, batch_size=BATCH, generator=orders)
        return "trained"

    stack = Replicas([network(seed, rows.shape[1]) for seed in SEEDS])
    last = lottery_ticket(stack, train, rounds=ROUNDS, fraction=FRACTION, output_factor=OUTPUT_FACTOR)[-1]
    return [dict(masks) for masks in last.masks.unstack()]


def looped(rows: Tensor, targets: Tensor, optimizer: Callable[..., torch.optim.Optimizer]) -> list[dict[str, Tensor]]:
    """One search after another, with torch's pruning."""
    found = []
    for seed in SEEDS:
        model = network(seed, rows.shape[1])
        initial = {name: value.clone() for name, value in model.state_dict().items()}
        layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for module in layers.values():
            prune.identity(module, "weight")
        for round_ in range(ROUNDS + 1):
            if round_:
                prune_and_rewind(layers, initial)
            order = torch.Generator().manual_seed(seed)
            fit(model, rows, targets, optimizer=optimizer, steps=STEPS, batch_size=BATCH, generator=order)
        found.append({f"{name}.weight": module.weight_mask.bool() for name, module in layers.items()})
    return found


def prune_and_rewind(layers: dict[str, nn.Module], initial: dict[str, Tensor]) -> None:
    for index, (name, module) in enumerate(layers.items()):
        rate = FRACTION * (OUTPUT_FACTOR if index == len(layers) - 1 else 1)
        # Left to itself it scores the weights of the last forward pass, one step before the end of training.
        scores = module.weight_orig.detach()
        prune.l1_unstructured(module, "weight", round(rate * int(module.weight_mask.sum())), importance_scores=scores)
        with torch.no_grad():
            module.weight_orig.copy_(initial[f"{name}.weight"])
            module.bias.copy_(initial[f"{name}.bias"])


def agreement(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> str:
    same = sum(int((a[name] == b[name]).sum()) for a, b in zip(ours, theirs, strict=True) for name in b)
    total = sum(mask.numel() for masks in theirs for mask in masks.values())
    return f"{100 * same / total:.3f} % of the mask entries are equal"


def searches() -> list[Comparison]:
    comparisons = []
    for inputs in (784, 64):
        rows = data(inputs)
        ours = partial(stacked, *rows)
        for optimizer, words in ((adam, "its Adam as one writes it"), (fused_adam, "fused Adam")):
            theirs = partial(looped, *rows, optimizer)
            comparisons.append(
                compare(
                    f"ten searches of ten rounds, LeNet-300-100 on {inputs} inputs",
                    f"a loop with torch.nn.utils.prune, {words}",
                    ours,
                    theirs,
                    repeats=3,
                    aim=0.35,
                    agreement=agreement(ours(), theirs()),
                )
            )
    return comparisons


def pruning_steps() -> list[Comparison]:
    weights = torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(0))
    masks = Masks({"weight": torch.ones(WEIGHTS, dtype=torch.bool)})
    count = round(FRACTION * WEIGHTS)

    def ours() -> Tensor:
        return magnitude_prune({"weight": weights}, masks, FRACTION)["weight"]

    def by_sorting() -> Tensor:
        magnitudes = weights.abs()
        return magnitudes > magnitudes.sort().values[count - 1]

    def by_torch() -> Tensor:
        layer = nn.Module()
        layer.register_parameter("weight", nn.Parameter(weights, requires_grad=False))
        return prune.l1_unstructured(layer, "weight", count).weight_mask.bool()

    work, kept = "pruning 20 % of 100 million weights", ours()
    return [
        compare(
            work, peer, ours, theirs, repeats=1, agreement=f"{int((kept != theirs()).sum())} mask entries differ (ties)"
        )
        for peer, theirs in (
            ("a full sort", by_sorting),
            ("torch.nn.utils.prune.l1_unstructured", by_torch),
        )
    ]


if __name__ == "__main__":
    write("lottery_ticket", searches() + pruning_steps())
