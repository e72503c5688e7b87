"""Transformer fusion: the whole walk and its solvers against the published way of working and against POT.

``python benchmarks/transformer_fusion.py`` compares, on one core,

- the fusion of two vision transformers of the paper's width (384, patches of 4, two of its seven blocks, 100 images)
  with a loop written after the published procedure: images one by one, what every module puts out copied and kept,
  each table standardised, one distance matrix a layer, POT's `ot.emd` or `ot.sinkhorn` with its defaults: time, and
  peak memory above the start in a process of its own each;
- soft plans with `ot.sinkhorn` in the log domain, which alone is as safe at small regularisation, stopped at the same
  marginal error; and with its default, which works on the kernel itself;
- exact and soft plans between layers of 4096 neurons with `scipy.optimize.linear_sum_assignment` and `ot.sinkhorn`:
  time, and peak memory.
"""

import copy
import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ot
import torch
from scipy.optimize import linear_sum_assignment
from side_by_side import Comparison, compare, write
from torch import Tensor, nn

from etude.merge import Exact, Sinkhorn, fuse
from etude.models import VisionTransformer

IMAGES, BLOCKS, WIDTH = 100, 2, 384
REGULARISATION = 0.08
WIDE = 4096
WIDE_WORKS = ("exact", "assignment", "soft", "pot")
TOLERANCE = 1e-7


def networks() -> list[VisionTransformer]:
    made = [VisionTransformer(torch.Generator().manual_seed(s), dim=WIDTH, depth=BLOCKS, heads=12) for s in (0, 1)]
    for seed, network in enumerate(made):  # positions and class token as after some training
        draw = torch.Generator().manual_seed(10 + seed)
        with torch.no_grad():
            for value in network.parameters():
                value.add_(0.02 * torch.randn(value.shape, generator=draw))
    return [network.eval() for network in made]


def images() -> Tensor:
    return torch.rand(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def ours(solver: Exact | Sinkhorn, pair: list[VisionTransformer], shown: Tensor) -> dict[str, Tensor]:
    return dict(fuse(pair, shown, solver=solver, class_token="own").plans)


def published(soft: bool, pair: list[VisionTransformer], shown: Tensor) -> dict[str, Tensor]:
    """The published procedure for this network; its plans."""
    return LayerByLayer(pair, shown, soft).run()


class LayerByLayer:
    """A layer after another: hooks everywhere, one image at a time, one plan of POT for each."""

    def __init__(self, pair: list[VisionTransformer], shown: Tensor, soft: bool):
        self.soft, self.plans = soft, {}
        self.weights = [{name: value.detach() for name, value in network.named_parameters()} for network in pair]
        self.fused: dict[str, Tensor] = {}
        self.tables = [self.standardised(self.recorded(network, shown)) for network in pair]

    @staticmethod
    def recorded(network: nn.Module, shown: Tensor) -> dict[str, Tensor]:
        """What every module puts out, image by image, all of it kept."""
        latest: dict[str, Tensor] = {}
        kept: dict[str, list[Tensor]] = {}

        def save(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            latest[name] = output.detach()

        hooks = [module.register_forward_hook(partial(save, name)) for name, module in network.named_modules()]
        with torch.no_grad():
            for image in shown:
                network(image.unsqueeze(0))
                for name, value in latest.items():
                    kept.setdefault(name, []).append(copy.deepcopy(value))
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(values) for name, values in kept.items()}

    @staticmethod
    def standardised(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
        tables = {}
        for name, value in recorded.items():
            table = value.flatten(2).transpose(1, 2) if value.dim() == 4 else value
            table = table.flatten(0, -2)
            tables[name] = (table - table.mean(0)) / (table.std(0) + 1e-9)
        return tables

    def plan(self, name: str, first: Tensor, second: Tensor) -> Tensor:
        """n times the plan between the columns of two tables."""
        cost = torch.cdist(first.T.contiguous(), second.T.contiguous()).numpy()
        cost = cost / cost.max()
        masses = [np.ones(size) / size for size in cost.shape]
        found = ot.sinkhorn(*masses, cost, REGULARISATION) if self.soft else ot.emd(*masses, cost)
        self.plans[name] = torch.from_numpy(found).float()
        return self.plans[name] * len(found)

    def layer(self, path: str, before: Tensor | None) -> Tensor:
        """Fuse one layer; its map."""
        after = self.plan(path, *(tables[path] for tables in self.tables))
        weight, bias = (self.weights[0][f"{path}.{kind}"].flatten(1 if kind == "weight" else 0) for kind in KINDS)
        weight = after.T @ (weight if before is None else weight @ before)
        for kind, value in zip(KINDS, (weight, after.T @ bias), strict=True):
            other = self.weights[1][f"{path}.{kind}"]
            self.fused[f"{path}.{kind}"] = (value.view_as(other) + other) / 2
        return after

    def carried(self, names: tuple[str, ...], carry: Tensor) -> None:
        """Fuse what carries units along its last axis."""
        for name in names:
            self.fused[name] = (self.weights[0][name] @ carry + self.weights[1][name]) / 2

    def run(self) -> dict[str, Tensor]:
        positions = self.plan("positions", *(self.table_of_positions(side) for side in (0, 1)))
        token = self.plan("class_token", *(weights["class_token"][0] for weights in self.weights))
        self.carried(("positions",), positions)
        self.carried(("class_token",), token)
        stream = (self.layer("patches", None) + positions) / 2
        for block in range(BLOCKS):
            path = f"blocks.{block}"
            self.carried((f"{path}.attention_norm.weight", f"{path}.attention_norm.bias"), stream)
            for name in ("query", "key"):
                self.layer(f"{path}.attention.{name}", stream)
            value = self.layer(f"{path}.attention.value", stream)
            stream = (stream + self.layer(f"{path}.attention.output", value)) / 2
            self.carried((f"{path}.mlp_norm.weight", f"{path}.mlp_norm.bias"), stream)
            hidden = self.layer(f"{path}.mlp.0", stream)
            stream = (stream + self.layer(f"{path}.mlp.2", hidden)) / 2
        self.carried(("norm.weight", "norm.bias", "classify.weight"), stream)
        self.fused["classify.bias"] = (self.weights[0]["classify.bias"] + self.weights[1]["classify.bias"]) / 2
        return self.plans

    def table_of_positions(self, side: int) -> Tensor:
        return self.weights[side]["positions"][0]


KINDS = ("weight", "bias")


def apart(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """How far the plans of layers are apart, in units of one neuron's mass."""
    layers = [name for name in mine if name in theirs and name.startswith(("blocks", "patches"))]
    largest = max(float((mine[name] - theirs[name]).abs().max()) * len(mine[name]) for name in layers)
    return f"largest difference in {len(layers)} layers' plans {largest:.1e} of a neuron's mass"


def once(
    work: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any], aim: float | None = None
) -> tuple[Comparison, Any, Any]:
    """Two slow ways of doing the same, timed once each, and what they found."""
    seconds, results = [], []
    for call in (ours, theirs):
        started = time.perf_counter()
        results.append(call())
        seconds.append(time.perf_counter() - started)
    ratio = seconds[0] / seconds[1]
    return Comparison(work, peer, *seconds, ratio, ratio, ratio, aim), *results


def whole_walks() -> list[Comparison]:
    pair, shown = networks(), images()
    ours(Sinkhorn(REGULARISATION), pair, shown[:20])
    found = []
    for soft, kind, solver in ((True, "soft", Sinkhorn(REGULARISATION)), (False, "exact", Exact())):
        comparison, mine, theirs = once(
            f"fusing two vision transformers, {kind} plans",
            f"the published procedure, {'ot.sinkhorn' if soft else 'ot.emd'}",
            partial(ours, solver, pair, shown),
            partial(published, soft, pair, shown),
            aim=0.2,
        )
        found.append(replace(comparison, agreement=apart(mine, theirs)))
    return found


def high_water() -> float:
    """Most memory this process ever held, in MiB (Linux); `resource` would count what its parent held, too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def peak(work: str, sender: Any) -> None:
    """Peak memory above the start, in MiB, of one way of doing the work."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if work in WIDE_WORKS:
        before = high_water()
        wide_call(work)()
    else:
        pair, shown = networks(), images()
        ours(Sinkhorn(1.0), pair, shown[:2])  # what the first call loads is not the work's
        before = high_water()
        ours(Sinkhorn(REGULARISATION), pair, shown) if work == "fused" else published(True, pair, shown)
    sender.send(high_water() - before)


def peak_of(work: str) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak, args=(work, sender))
    process.start()
    found: float = receiver.recv()
    process.join()
    return found


def memory(work: str, peer: str, names: tuple[str, str]) -> Comparison:
    found = [peak_of(name) for name in names]
    ratio = found[0] / found[1]
    return Comparison(f"{work}, peak MiB above the start", peer, *found, *[ratio] * 3, None, "MiB in place of seconds")


def costs(size: int) -> Tensor:
    """Costs as between trained layers: neurons of which each has a noisy partner, divided by their maximum."""
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(size, 200, generator=draw)
    second = 0.6 * first[torch.randperm(size, generator=draw)] + 0.8 * torch.randn(size, 200, generator=draw)
    found = torch.cdist(first, second)
    return found.div_(found.max())


def soft_plans() -> list[Comparison]:
    found = []
    for regularisation in (REGULARISATION, 0.005):
        cost = costs(768)
        masses = [np.ones(size) / size for size in cost.shape]
        table = cost.double().numpy()
        call = partial(Sinkhorn(regularisation, tolerance=TOLERANCE).plan, cost)
        for method in ("sinkhorn_log", "sinkhorn"):
            limits = {"stopThr": TOLERANCE, "numItermax": 20_000, "warn": False}
            theirs = partial(ot.sinkhorn, *masses, table, regularisation, method=method, **limits)
            difference = float(np.abs(call().numpy() - theirs()).max() * len(cost))
            found.append(
                compare(
                    f"soft plan of 768 x 768, regularisation {regularisation}",
                    f"ot.sinkhorn, method {method}",
                    call,
                    theirs,
                    repeats=2,
                    agreement=f"largest difference {difference:.1e} of a neuron's mass",
                )
            )
    return found


def wide_call(work: str) -> Callable[[], object]:
    """One way of finding a wide plan, its costs made: for ours in float32, for the others in the float64 they need."""
    cost = costs(WIDE)
    if work == "exact":
        return lambda: Exact().plan(cost)
    if work == "soft":
        return lambda: Sinkhorn(REGULARISATION).plan(cost)
    table, masses = cost.double().numpy(), [np.ones(WIDE) / WIDE] * 2
    if work == "assignment":
        return lambda: linear_sum_assignment(table)
    return lambda: ot.sinkhorn(*masses, table, REGULARISATION, stopThr=TOLERANCE, warn=False)


def wide_plans() -> list[Comparison]:
    found = []
    for mine, theirs, work, peer in (
        ("exact", "assignment", "exact plan of 4096 x 4096", "scipy.optimize.linear_sum_assignment"),
        ("soft", "pot", "soft plan of 4096 x 4096", "ot.sinkhorn"),
    ):
        found.append(once(work, peer, wide_call(mine), wide_call(theirs))[0])
        found.append(memory(f"{work} with its costs", peer, (mine, theirs)))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    walks = memory("fusing two vision transformers", "the published procedure", ("fused", "published"))
    write("transformer_fusion", [*whole_walks(), walks, *soft_plans(), *wide_plans()])
