"""Nested sub-networks: a training step on views against masks, and a switch of size against loading another model.

``python benchmarks/sortednet.py`` compares, on a vision transformer with 160 sub-networks (5 depths, 4 numbers of
heads, 8 hidden widths),

- one training step of 4 drawn sub-networks with the same step where the full network runs on weights times masks, and
  with one ordinary step of the full network;
- a switch to another size with building a network of that size and loading its weights from memory.
"""

import torch
import torch.nn.functional as F
from side_by_side import Comparison, compare, write
from torch import Tensor, nn

from etude.compress import Depth, Heads, Size, SortedStep, SubnetSpace, Width
from etude.models import VisionTransformer

ACCUMULATE, BATCH = 4, 128
STEPS = 4
"""Steps a measurement takes, each with draws of its own."""


def network(depth: int = 5, hidden: int = 128) -> VisionTransformer:
    draw = torch.Generator().manual_seed(0)
    return VisionTransformer(draw, size=28, patch=7, channels=1, dim=64, depth=depth, heads=4, hidden=hidden)


def space_of(model: nn.Module) -> SubnetSpace:
    return SubnetSpace(
        model,
        {
            "depth": Depth("blocks", range(1, 6)),
            "heads": Heads("blocks.*.attention", range(1, 5)),
            "hidden": Width("blocks.*.mlp.0", range(16, 129, 16)),
        },
        inputs=torch.zeros(2, 1, 28, 28),
    )


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(BATCH, 1, 28, 28, generator=draw), torch.randint(10, (BATCH,), generator=draw)


def masked_step(model: nn.Module, masks: list[dict[str, Tensor]], batch: tuple[Tensor, Tensor]) -> None:
    """The same losses by running the whole network with the weights outside the sub-network set to zero."""
    parameters = dict(model.named_parameters())
    for each in masks:
        held = {name: value * each[name] for name, value in parameters.items()}
        loss = F.cross_entropy(torch.func.functional_call(model, held, batch[0]), batch[1])
        (loss / len(masks)).backward()


def training() -> list[Comparison]:
    model, batch = network(), data()
    space = space_of(model)
    draw = torch.Generator().manual_seed(2)
    draws = [space.sample(draw, count=ACCUMULATE) for _ in range(STEPS)]
    masks = [[{n: m.float() for n, m in space.masks(size).items()} for size in sizes] for sizes in draws]
    share = sum(space.flops(size) for sizes in draws for size in sizes) / (STEPS * ACCUMULATE) / space.flops(space.full)

    def ours() -> None:
        model.zero_grad()
        order = torch.Generator().manual_seed(2)
        step = SortedStep(space, F.cross_entropy, accumulate=ACCUMULATE, generator=order)
        for _ in range(STEPS):
            step(batch)

    def by_masks() -> None:
        model.zero_grad()
        for each in masks:
            masked_step(model, each, batch)

    def plain() -> None:
        model.zero_grad()
        for _ in range(STEPS):
            F.cross_entropy(model(batch[0]), batch[1]).backward()

    work = f"a training step of {ACCUMULATE} sub-networks, mean share of operations {share:.2f}"
    agreement = f"gradients differ by at most {difference(model, ours, by_masks):.1e}"
    return [
        compare(work, "weights times masks", ours, by_masks, aim=0.5, agreement=agreement),
        compare(work, "one step of the full network", ours, plain, aim=ACCUMULATE * share * 1.15),
    ]


def difference(model: nn.Module, ours: object, theirs: object) -> float:
    found = []
    for step in (ours, theirs):
        step()  # type: ignore[operator]
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def switching() -> list[Comparison]:
    model = network()
    space = space_of(model)
    sizes: list[Size] = [space.size(depth=depth, hidden=hidden) for depth, hidden in ((3, 64), (4, 96))]
    states = [space.extract(size).state_dict() for size in sizes]
    repeats = 20

    def ours() -> None:
        with torch.no_grad():
            for _ in range(repeats):
                for size in sizes:
                    with space.activate(size):
                        pass

    def by_loading() -> None:
        for _ in range(repeats):
            for size, state in zip(sizes, states, strict=True):
                network(size["depth"], size["hidden"]).load_state_dict(state)

    return [compare("switching to another size", "building it and loading its weights", ours, by_loading, aim=0.01)]


if __name__ == "__main__":
    write("sortednet", training() + switching())
