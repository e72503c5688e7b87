"""What `etude.lab` costs over a bare loop: the cells of one study through `run`, and by calling its measurement."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from side_by_side import compare, write

from etude import data, models
from etude.core.training import fit
from etude.core.training import measure as measure_loss
from etude.lab import Claim, Paper, Study, better, run
from etude.lab.store import Store

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SEEDS = 3


@dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    steps: int = 2_000
    check_every: int = 100


def measure(config, arm, seed, context):
    """Train one arm, telling its progress twenty times."""
    found = data.load(config.dataset)
    network = models.mlp([64, 128, 10], torch.Generator().manual_seed(seed))
    optimizer = OPTIMIZERS[arm](network.parameters(), lr=1e-3)
    records = []
    for part in range(config.steps // config.check_every):
        generator = torch.Generator().manual_seed(1000 * seed + part)
        fit(
            network,
            found.train.inputs,
            found.train.targets,
            optimizer=optimizer,
            steps=config.check_every,
            batch_size=32,
            generator=generator,
        )
        accuracy = float(measure_loss(network, found.test.inputs, found.test.targets)[1])
        records.append({"part": part, "accuracy": accuracy})
        context.progress((part + 1) * config.check_every / config.steps, accuracy=accuracy)
    return records


study = Study(
    slug="overhead",
    paper=Paper(title="A small training", authors="none", year=2026),
    method="etude.core.training",
    presets=dict.fromkeys(("smoke", "small", "paper"), Config()),
    arms=tuple(OPTIMIZERS),
    measure=measure,
    claims=(Claim("C1", "Adam is faster.", better("adam", than="sgd", metric="accuracy", where={"part": 0})),),
    figure=lambda results: Figure(),
    usage="",
    seeds=SEEDS,
)


def bare(steps):
    """The same cells without the engine."""
    context = SimpleNamespace(device=torch.device("cpu"), progress=lambda *_, **__: None)
    return [
        {"arm": arm, "seed": seed} | record
        for arm, seed in itertools.product(study.arms, range(SEEDS))
        for record in measure(Config(steps=steps), arm, seed, context)
    ]


def through_the_lab(steps):
    """Planned, seeded, measured, stored and read back."""
    with TemporaryDirectory() as folder:
        run(study, results=Path(folder), workers=1, settings={"steps": steps})
        with Store(Path(folder)) as store:
            return [dict(record) for record in store.runs()[0].results]


def against_the_bare_loop(steps, repeats):
    same = through_the_lab(steps) == bare(steps)
    return compare(
        f"{len(study.arms) * SEEDS} cells of {steps} steps, one worker",
        "the bare loop",
        lambda: through_the_lab(steps),
        lambda: bare(steps),
        repeats=repeats,
        aim=1.02,
        agreement="every record is equal" if same else "records differ",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    write("lab_overhead", [against_the_bare_loop(2_000, 7), against_the_bare_loop(10_000, 5)])
