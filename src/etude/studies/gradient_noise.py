"""Adding Gradient Noise Improves Learning for Very Deep Networks: a deep fully connected network, poorly initialised.

All arms of a seed share initial weights and data order; the noise has a generator of its own. Sizes of the noise were
chosen on seeds from 1000 up. The random walk that noise starts in a dead network needs steps: its spread after T steps
of size lr is about lr (eta T^0.45 / 0.45)^0.5, which has to come near the weights' proper scale in every layer.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import nn

from etude import data, models
from etude.core.training import fit
from etude.core.training import measure as measure_loss
from etude.lab import Claim, Context, Paper, Record, Results, Study, all_of, at_most, better, within
from etude.lab.statistics import bootstrap_mean
from etude.train.gradient_noise import GradientNoise

NONE, NOISE, DROPOUT = "no noise", "gradient noise", "dropout"


@dataclass(frozen=True)
class Config:
    """One size of the experiment."""

    dataset: str = "mnist"
    rows: int = 10_000
    depth: int = 14
    shallow: int = 5
    width: int = 50
    steps: int = 5_000
    batch_size: int = 32
    learning_rate: float = 0.1
    clip_norm: float = 10.0
    eta_simple: float = 0.03
    eta_zero: float = 0.1
    eta_he: float = 0.01
    zero_depth: int = 10


PRESETS = {
    "smoke": Config("digits", rows=1200, depth=6, zero_depth=4, shallow=3, steps=300),
    "small": (Config(), Config("digits", rows=1200, steps=4_000)),
    "paper": Config(rows=55_000, depth=20, zero_depth=20, steps=100_000, eta_simple=0.01, eta_zero=0.01),
}


def measure(config: Config, arm: str, seed: int, context: Context) -> list[Record]:
    """Train one arm from every initialisation."""
    cases = [
        ("simple", config.depth, config.eta_simple),
        ("zero", config.zero_depth, config.eta_zero),
        ("he", config.depth, config.eta_he),
        ("shallow", config.shallow, config.eta_simple),
    ]
    records: list[Record] = []
    for position, (case, depth, eta) in enumerate(cases):
        records.append({"initialisation": case, **_train(config, arm, case, depth, eta, seed, context)})
        context.progress((position + 1) / len(cases), test_accuracy=records[-1]["test_accuracy"])
    return records


def _train(
    config: Config, arm: str, case: str, depth: int, eta: float, seed: int, context: Context
) -> dict[str, float]:
    found = data.load(config.dataset)
    train, test = found.train.take(min(config.rows, len(found.train))).to(context.device), found.test.to(context.device)
    sizes = [train.inputs[0].numel(), *[config.width] * depth, found.classes]
    network = models.mlp(
        sizes,
        torch.Generator().manual_seed(seed),
        initial="simple" if case == "shallow" else case,
        dropout=0.5 if arm == DROPOUT else 0.0,
    ).to(context.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.learning_rate)
    clip = partial(nn.utils.clip_grad_norm_, list(network.parameters()), config.clip_norm)
    if arm == NOISE:
        GradientNoise(optimizer, eta, generator=torch.Generator(context.device).manual_seed(7_000_003 + seed))
    torch.manual_seed(seed)  # dropout draws from the global generator
    started = time.perf_counter()
    fit(
        network,
        train.inputs,
        train.targets,
        optimizer=optimizer,
        steps=config.steps,
        batch_size=config.batch_size,
        generator=torch.Generator().manual_seed(1_000_003 + seed),
        before_step=lambda step: clip(),
    )
    seconds = time.perf_counter() - started
    train_loss, train_accuracy = measure_loss(network, train.inputs, train.targets)
    test_accuracy = measure_loss(network, test.inputs, test.targets)[1]
    return {
        "test_accuracy": float(test_accuracy),
        "train_accuracy": float(train_accuracy),
        "train_loss": float(train_loss),
        "milliseconds_a_step": 1000 * seconds / config.steps,
    }


def figure(results: Results) -> Figure:
    """Table 1 as a figure: test accuracy by initialisation, without and with noise, and with dropout."""
    drawing = Figure(figsize=(8, 3.6), layout="constrained")
    axes = drawing.subplots()
    cases = ("simple", "zero", "he", "shallow")
    for index, arm in enumerate((NONE, NOISE, DROPOUT)):
        for place, case in enumerate(cases):
            values = list(results.by_seed("test_accuracy", arm, {"initialisation": case}).values())
            x = place + 0.2 * (index - 1)
            label = arm if place == 0 else None
            axes.plot(x, bootstrap_mean(values).mean, "_", color=f"C{index}", markersize=16, label=label)
            axes.plot([x] * len(values), values, "o", color=f"C{index}", markersize=3, alpha=0.7)
    names = ["N(0, 0.1²), deep", "zero, deep", "He, deep", "N(0, 0.1²), shallow"]
    axes.set_xticks(range(len(cases)), names)
    axes.set_ylabel("test accuracy")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return drawing


SIMPLE, ZERO, HE = {"initialisation": "simple"}, {"initialisation": "zero"}, {"initialisation": "he"}
SHALLOW = {"initialisation": "shallow"}

study = Study(
    slug="gradient-noise",
    paper=Paper(
        title="Adding Gradient Noise Improves Learning for Very Deep Networks",
        authors="A. Neelakantan, L. Vilnis, Q. V. Le, I. Sutskever, L. Kaiser, K. Kurach, J. Martens",
        year=2015,
        venue="arXiv",
        arxiv="1511.06807",
    ),
    method="etude.train.gradient_noise",
    presets=PRESETS,
    arms=(NOISE, NONE, DROPOUT),
    measure=measure,
    claims=(
        Claim(
            "C2",
            "Noise lowers the training loss: it helps to optimise, not only to regularise.",
            paper="Table 2: training error 10.5 to 9.6 % (memory network, one stage)",
            rule=better(NOISE, than=NONE, metric="train_loss", where=SIMPLE, lower=True),
            note="Measured on the deep network with simple initialisation, not on a memory network.",
        ),
        Claim(
            "C3",
            "With noise a very deep fully connected network trains by plain SGD from a poor initialisation.",
            paper="Table 1: best accuracy 89.9 to 96.7 %, mean 43.1 to 52.7 %, 20 layers, N(0, 0.1²)",
            rule=better(NOISE, than=NONE, metric="test_accuracy", where=SIMPLE),
        ),
        Claim(
            "C3d",
            "With a good initialisation noise changes nothing.",
            paper="Table 1: He initialisation 97.4 to 97.2 % (best), 91.7 to 91.7 % (mean)",
            rule=within(NOISE, than=NONE, metric="test_accuracy", margin=0.02, where=HE),
        ),
        Claim(
            "C3e",
            "From zero initialisation training fails without noise and works with it.",
            paper="Table 1: best accuracy 11.4 to 94.5 %",
            rule=all_of(
                better(NOISE, than=NONE, metric="test_accuracy", by=0.3, where=ZERO),
                at_most(NONE, metric="test_accuracy", value=0.2, where=ZERO),
            ),
        ),
        Claim(
            "C3f",
            "Dropout does not rescue the badly initialised network.",
            paper="Table 1: 11.3 % (best) and 10.8 % (mean) with dropout",
            rule=at_most(DROPOUT, metric="test_accuracy", value=0.2, where=SIMPLE),
        ),
        Claim(
            "C3g",
            "A shallow network does not gain.",
            paper="Section 4.1: a 5-layer network did not gain",
            rule=within(NOISE, than=NONE, metric="test_accuracy", margin=0.02, where=SHALLOW),
        ),
    ),
    figure=figure,
    usage="""from etude.train import GradientNoise

noise = GradientNoise(optimizer, eta=0.01, clip_norm=10.0)
# ... your own training loop: every optimizer.step() now clips the gradients, then adds noise
""",
    headline="test_accuracy",
)
