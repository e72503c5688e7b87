"""The Lottery Ticket Hypothesis: LeNet-300-100 (or Conv-2/4/6), pruned round by round, against its baselines.

All arms of a seed share the dense initialisation, the data order and the length of training; the validation set picks
the early-stopping point afterwards and never influences pruning. Levels are fixed beforehand; the paper quotes
maxima over levels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from etude import data, models
from etude.compress.prune import Masks, Ticket, lottery_ticket, magnitude_prune, random_masks_like
from etude.core.params import bare_state
from etude.core.replicas import Replicas
from etude.core.training import History, fit
from etude.core.training import measure as measure_loss
from etude.lab import (
    Claim,
    Context,
    Paper,
    Record,
    Results,
    Study,
    all_of,
    at_least,
    better,
    no_worse,
    ratio_at_least,
)
from etude.lab.statistics import bootstrap_mean

TICKET, DENSE, REINIT = "winning ticket", "dense", "random reinitialisation"
SPARSE, ONE_SHOT, CONTINUED = "random sparsity", "one-shot", "continued training"
NOISE, STRONG_NOISE, SURVIVORS = "ticket with 0.5 sigma noise", "ticket with 3 sigma noise", "survivors redrawn"
AT_START = "pruned at initialisation"

COMPARED = (3, 7, 10, 13)
"""Rounds at which the baselines are trained: 51, 21, 11 and 5.5 % of the weights remain."""


@dataclass(frozen=True)
class Config:
    """One size of the experiment; the defaults are the paper's for LeNet (figure 2), but for a subset of MNIST."""

    dataset: str = "mnist"
    network: str = "lenet"
    rows: int = 10_000
    validation_rows: int = 2_000
    steps: int = 1_500
    batch_size: int = 60
    learning_rate: float = 1.2e-3
    check_every: int = 50
    rounds: int = 15
    fraction: float = 0.2
    conv_fraction: float = 0.1
    draws: int = 2


PRESETS = {
    "smoke": Config("digits", rows=600, validation_rows=200, steps=30, check_every=15, rounds=13, draws=1),
    "small": (
        Config(),
        Config("digits", rows=1200, validation_rows=200, steps=400, check_every=10, rounds=13),
    ),
    "paper": Config(rows=55_000, validation_rows=5_000, steps=50_000, check_every=100, rounds=25, draws=3),
}


def level(round_: int) -> float:
    """The nominal share of weights that remains after a number of rounds at 20 %."""
    return round(0.8**round_, 4)


@dataclass(frozen=True)
class Experiment:
    """What all arms of one seed share: the data, the initialisation and the training recipe."""

    config: Config
    seed: int
    device: torch.device

    def network(self, generator: torch.Generator) -> nn.Module:
        """A network at a fresh initialisation."""
        if self.config.network == "lenet":
            inputs = self.splits()[0].inputs[0].numel()
            return models.lenet_300_100(generator, inputs=inputs).to(self.device)
        _, channels, size, _ = self.splits()[0].inputs.shape
        return models.conv_net(self.config.network, generator, channels=channels, size=size).to(self.device)

    def initial(self) -> nn.Module:
        """The dense network of this seed at its initialisation."""
        return self.network(self.generator(0))

    def generator(self, purpose: int) -> torch.Generator:
        """A generator of its own for each purpose, so that arms do not shift one another's draws."""
        return torch.Generator().manual_seed(1_000_003 * purpose + self.seed)

    def splits(self) -> tuple[data.Split, data.Split, data.Split]:
        """Training, validation and test rows."""
        found = data.load(self.config.dataset)
        train = found.train.take(min(self.config.rows, len(found.train)))
        validation = found.validation.take(min(self.config.validation_rows, len(found.validation)))
        return train.to(self.device), validation.to(self.device), found.test.to(self.device)

    def train(self, network: nn.Module) -> tuple[History, Tensor]:
        """Train in place; the checks' history and the final training accuracy."""
        train, validation, test = self.splits()
        history = fit(
            network,
            train.inputs,
            train.targets,
            optimizer=partial(torch.optim.Adam, lr=self.config.learning_rate, fused=True),
            steps=self.config.steps,
            batch_size=self.config.batch_size,
            generator=self.generator(1),
            checks={
                "validation": (validation.inputs, validation.targets),
                "test": (test.inputs, test.targets),
            },
            check_every=self.config.check_every,
        )
        return history, measure_loss(network, train.inputs, train.targets)[1]

    def prune_settings(self, network: nn.Module) -> dict[str, object]:
        """The paper's layer-wise rates: convolutions at their own, the output layer at half."""
        filters = [name for name, value in network.named_parameters() if value.dim() == 4]
        return {"fraction": self.config.fraction, "rates": dict.fromkeys(filters, self.config.conv_fraction)}


def measure(config: Config, arm: str, seed: int, context: Context) -> list[Record]:
    """Train one arm at its levels of sparsity."""
    experiment = Experiment(config, seed, context.device)
    found = context.artifact("tickets", lambda: _search(experiment, "reset", context))
    rounds = range(config.rounds + 1)
    if arm == DENSE:
        return [{"remaining": level(n), **_summary(found, 0)} for n in rounds]
    if arm == TICKET:
        return [{"remaining": level(n), **_summary(found, n)} | _movement(experiment, found, n) for n in rounds]
    tickets = {n: _ticket(experiment, found, n) for n in COMPARED}
    if arm == CONTINUED:
        return _continued(experiment, tickets, context)
    if arm in (NOISE, STRONG_NOISE, SURVIVORS, AT_START):
        tickets = {7: tickets[7]}
    records: list[Record] = []
    for position, (n, ticket) in enumerate(tickets.items()):
        networks = _start(experiment, arm, n, ticket)
        records += _trained(experiment, networks, n)
        context.progress((position + 1) / len(tickets), accuracy=records[-1]["accuracy"])
    return records


def _start(experiment: Experiment, arm: str, n: int, ticket: Ticket) -> list[nn.Module]:
    """The networks an arm trains at one level, under their masks."""
    generator = experiment.generator(100 + n)
    if arm == REINIT:
        initialise = partial(_redraw, experiment)
        draws = range(experiment.config.draws)
        return [ticket.instantiate("reinit", generator=generator, initialise=initialise) for _ in draws]
    if arm == SPARSE:
        return [random_masks_like(ticket.masks, generator).apply(experiment.initial())]
    if arm in (ONE_SHOT, AT_START):
        weights = ticket.trained if arm == ONE_SHOT else ticket.initial
        return [_at_once(weights, ticket.masks).apply(experiment.initial())]
    if arm == SURVIVORS:
        return [ticket.instantiate("survivors", generator=generator)]
    return [ticket.instantiate("noise", generator=generator, noise=0.5 if arm == NOISE else 3.0)]


def _at_once(weights: Mapping[str, Tensor], like: Masks) -> Masks:
    """Pruned in one step to the counts that ``like`` has in each layer."""
    every = Masks({name: torch.ones_like(mask) for name, mask in like.items()})
    shares = {name: 1 - count / like[name].numel() for name, count in like.counts().items()}
    return magnitude_prune(weights, every, 0.5, rates=shares)


def _continued(experiment: Experiment, tickets: Mapping[int, Ticket], context: Context) -> list[Record]:
    """Strategy 2: its own search, and what its masks reach when they are reset at last."""
    found = _search(experiment, "continue", context)
    records: list[Record] = []
    for n in tickets:
        network = _masks(found, n).apply(experiment.initial())
        tuned = {"tuned_accuracy": float(found[f"history/{n}"][-1, 2])}
        records += [record | tuned for record in _trained(experiment, [network], n)]
    return records


def _trained(experiment: Experiment, networks: list[nn.Module], n: int) -> list[dict[str, float]]:
    """Train the networks of one level, several as one stack; a record for each."""
    stacked = Replicas(networks) if len(networks) > 1 else networks[0]
    history, train_accuracy = experiment.train(stacked)
    tables = _tables(history)
    accuracies = train_accuracy.reshape(-1)
    return [
        {"remaining": level(n), **_figures(table, float(accuracy))}
        for table, accuracy in zip(tables, accuracies, strict=True)
    ]


def _search(experiment: Experiment, strategy: str, context: Context) -> dict[str, Tensor]:
    """Iterative pruning, as tensors: masks and history of every round, and the dense network's trained weights."""
    found: dict[str, Tensor] = {}

    def keep(ticket: Ticket) -> None:
        history, train_accuracy = ticket.metrics
        found[f"history/{ticket.round}"] = _tables(history)[0]
        found[f"train_accuracy/{ticket.round}"] = train_accuracy
        found.update({f"mask/{ticket.round}/{name}": mask for name, mask in ticket.masks.items()})
        if ticket.round == 0:
            found.update({f"trained/{name}": value for name, value in ticket.trained.items()})
        share = (ticket.round + 1) / (experiment.config.rounds + 1)
        context.progress(share, accuracy=float(history.accuracy["test"][-1]))

    network = experiment.initial()
    settings = experiment.prune_settings(network)
    lottery_ticket(
        network,
        experiment.train,
        rounds=experiment.config.rounds,
        strategy=strategy,
        on_round=keep,
        **settings,  # type: ignore[arg-type]
    )
    return found


def _tables(history: History) -> list[Tensor]:
    """A table for each trained network: step, validation loss, test accuracy, a row a check."""
    steps = history.steps.float()
    loss = history.loss["validation"].reshape(len(steps), -1)
    accuracy = history.accuracy["test"].reshape(len(steps), -1)
    return [torch.stack([steps, loss[:, r], accuracy[:, r]], 1) for r in range(loss.shape[1])]


def _figures(table: Tensor, train_accuracy: float) -> dict[str, float]:
    """The metrics of one training: early stopping is read off afterwards, from the validation loss."""
    best = int(table[:, 1].argmin())
    return {
        "early_stop": float(table[best, 0]),
        "accuracy": float(table[best, 2]),
        "final_accuracy": float(table[-1, 2]),
        "train_accuracy": train_accuracy,
        "gap": train_accuracy - float(table[-1, 2]),
        "stopped_inside": float(best < len(table) - 1),
    }


def _summary(found: Mapping[str, Tensor], n: int) -> dict[str, float]:
    masks = _masks(found, n)
    figures = _figures(found[f"history/{n}"], float(found[f"train_accuracy/{n}"]))
    return figures | {"weights": masks.remaining, "tuned_accuracy": figures["final_accuracy"]}


def _movement(experiment: Experiment, found: Mapping[str, Tensor], n: int) -> dict[str, float]:
    """In the dense training: how much further the weights of the n-th ticket moved than the others (F.5)."""
    if not n > 0:
        return {}
    initial = bare_state(experiment.initial())
    inside, outside, outward = [], [], []
    for name, mask in _masks(found, n).items():
        moved = (found[f"trained/{name}"] - initial[name]).abs()
        inside.append(moved[mask])
        outside.append(moved[~mask])
        outward.append((found[f"trained/{name}"].abs() - initial[name].abs())[mask])
    return {
        "movement_ratio": float(torch.cat(inside).mean() / torch.cat(outside).mean()),
        "outward": float(torch.cat(outward).mean()),
    }


def _masks(found: Mapping[str, Tensor], n: int) -> Masks:
    prefix = f"mask/{n}/"
    return Masks({name.removeprefix(prefix): mask for name, mask in found.items() if name.startswith(prefix)})


def _ticket(experiment: Experiment, found: Mapping[str, Tensor], n: int) -> Ticket:
    """The n-th ticket, with the dense network's trained weights (which one-shot pruning looks at)."""
    network = experiment.initial()
    trained = {name.removeprefix("trained/"): v for name, v in found.items() if name.startswith("trained/")}
    return Ticket(_masks_in_order(network, _masks(found, n)), bare_state(network), trained, None, n, network)


def _masks_in_order(network: nn.Module, masks: Masks) -> Masks:
    """Masks in the network's order (storage sorts names): the last is the output layer."""
    return Masks({name: masks[name] for name, _ in network.named_parameters() if name in masks})


def _redraw(experiment: Experiment, network: nn.Module, generator: torch.Generator) -> None:
    network.load_state_dict(experiment.network(generator).state_dict())


def figure(results: Results) -> Figure:
    """Figures 3 and 4 redrawn: early-stopping iteration and the accuracy there, by weights remaining."""
    drawing = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = drawing.subplots(1, 2)
    arms = (TICKET, REINIT, SPARSE, ONE_SHOT, CONTINUED)
    for index, arm in enumerate(arms):
        for axes, metric in ((left, "early_stop"), (right, "accuracy")):
            _curve(axes, results, arm, metric, f"C{index}", "o-" if arm == TICKET else "s--")
    for axes, metric in ((left, "early_stop"), (right, "accuracy")):
        dense = results.by_seed(metric, DENSE, {"remaining": 1.0}).values()
        axes.axhline(bootstrap_mean(list(dense)).mean, color="0.5", linewidth=1, linestyle=":", label=DENSE)
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xticks([1, 0.5, 0.2, 0.1, 0.05], ["100", "50", "20", "10", "5"])
        axes.minorticks_off()
        axes.set_xlabel("weights remaining (%)")
    left.set_ylabel("early-stopping iteration")
    right.set_ylabel("test accuracy at early stopping")
    right.legend(fontsize=8, frameon=False)
    return drawing


def _curve(axes: object, results: Results, arm: str, metric: str, colour: str, style: str) -> None:
    levels: Iterable[float] = results.coordinates("remaining", arm)
    points = [(x, bootstrap_mean(list(results.by_seed(metric, arm, {"remaining": x}).values()))) for x in levels]
    x, means = [p[0] for p in points], [p[1].mean for p in points]
    axes.plot(x, means, style, color=colour, markersize=3, linewidth=1.2, label=arm)  # type: ignore[attr-defined]
    if all(p[1].high < float("inf") for p in points):
        low, high = [p[1].low for p in points], [p[1].high for p in points]
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)  # type: ignore[attr-defined]


AT_21, AT_17, AT_13 = {"remaining": level(7)}, {"remaining": level(8)}, {"remaining": level(9)}
AT_11, AT_9, AT_5 = {"remaining": level(10)}, {"remaining": level(11)}, {"remaining": level(13)}

study = Study(
    slug="lottery-ticket",
    paper=Paper(
        title="The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        authors="Jonathan Frankle, Michael Carbin",
        year=2019,
        venue="ICLR 2019",
        arxiv="1803.03635",
    ),
    method="etude.compress.prune",
    presets=PRESETS,
    arms=(TICKET, DENSE, REINIT, SPARSE, ONE_SHOT, CONTINUED, NOISE, STRONG_NOISE, SURVIVORS, AT_START),
    measure=measure,
    claims=(
        Claim(
            "C1",
            "Under 20 % of the weights, trained from their original initialisation, match the dense network's accuracy "
            "in no more iterations.",
            paper="Fig. 4a: LeNet matches the dense network down to 3.6 % of its weights",
            rule=all_of(
                no_worse(TICKET, than=DENSE, metric="accuracy", margin=0.003, where=AT_17),
                no_worse(TICKET, than=DENSE, metric="early_stop", margin=50, where=AT_17, lower=True),
            ),
        ),
        Claim(
            "C2",
            "Winning tickets learn faster than the dense network.",
            paper="Fig. 4a: early stopping 38 % earlier at 21 % of the weights",
            rule=ratio_at_least(DENSE, than=TICKET, metric="early_stop", factor=1.0, where=AT_21),
        ),
        Claim(
            "C3",
            "Winning tickets reach higher test accuracy than the dense network.",
            paper="Fig. 4a: more than 0.3 points at 13.5 % of the weights",
            rule=better(TICKET, than=DENSE, metric="accuracy", where=AT_13),
        ),
        Claim(
            "C4",
            "It is the initialisation, not the mask alone: reinitialised tickets learn slower and end less accurate.",
            paper="Fig. 4a: at 21 % the ticket is 2.51 times as fast and half a point more accurate",
            rule=all_of(
                better(TICKET, than=REINIT, metric="accuracy", where=AT_21),
                better(TICKET, than=REINIT, metric="accuracy", where=AT_11),
                ratio_at_least(REINIT, than=TICKET, metric="early_stop", where=AT_21),
                ratio_at_least(REINIT, than=TICKET, metric="early_stop", where=AT_11),
            ),
        ),
        Claim(
            "C5",
            "Iterative pruning finds better small tickets than one-shot pruning.",
            paper="Fig. 4c: one-shot keeps up to 17.6 % (speed) and 5.2 % (accuracy) of the weights",
            rule=better(TICKET, than=ONE_SHOT, metric="accuracy", where=AT_5),
        ),
        Claim(
            "C6",
            "Pruning after training removes over 90 % of the weights without harming accuracy.",
            paper="Introduction (premise)",
            rule=no_worse(CONTINUED, than=DENSE, metric="tuned_accuracy", margin=0.003, where={"remaining": level(10)}),
            note="Measured at 10.7 % of the weights, the level nearest to 90 % removed at which the arm is trained.",
        ),
        Claim(
            "C7",
            "The gap between training and test accuracy is smaller for winning tickets.",
            paper="Fig. 4b: training accuracy about 100 % for all, test accuracy up to 0.35 points higher",
            rule=better(TICKET, than=DENSE, metric="gap", where=AT_13, lower=True),
        ),
        Claim(
            "C10",
            "Resetting each round beats continued training, and random sparsity is no better than reinitialisation.",
            paper="Fig. 9, 10, 14",
            rule=all_of(
                better(TICKET, than=CONTINUED, metric="accuracy", where=AT_5),
                no_worse(REINIT, than=SPARSE, metric="accuracy", margin=0.003, where=AT_11),
            ),
        ),
        Claim(
            "C11",
            "In the dense training, the weights of the ticket move further than the others, and away from zero.",
            paper="Fig. 15-20",
            rule=all_of(
                at_least(TICKET, metric="movement_ratio", value=1.0, where=AT_21),
                at_least(TICKET, metric="outward", value=0.0, where=AT_21),
            ),
        ),
        Claim(
            "C12",
            "Noise of half an initial standard deviation is harmless, three still beat reinitialisation; redrawing the "
            "survivors' values, or pruning at initialisation, does not find tickets.",
            paper="Fig. 17, 18, 25",
            rule=all_of(
                no_worse(NOISE, than=TICKET, metric="accuracy", margin=0.003, where=AT_21),
                better(STRONG_NOISE, than=REINIT, metric="accuracy", where=AT_21),
                better(TICKET, than=SURVIVORS, metric="accuracy", where=AT_21),
                better(TICKET, than=AT_START, metric="accuracy", where=AT_21),
            ),
        ),
    ),
    figure=figure,
    usage="""from etude.compress import lottery_ticket

tickets = lottery_ticket(model, train, rounds=15)   # train(network) is your own loop and returns metrics
network = tickets[-1].instantiate()                 # masked, at its original initialisation: train it
""",
    headline="accuracy",
)
