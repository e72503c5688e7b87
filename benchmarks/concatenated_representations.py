"""Concatenated representations: features of ten members at once, and ridge probes at many penalties.

``python benchmarks/concatenated_representations.py`` compares

- the features of ten small networks as one stack with a loop over the members and `torch.cat`, as one writes it:
  perceptrons in batches of 16 and of 1000 rows, and small convolutional networks;
- the ridge probe at twenty penalties with twenty fits of scikit-learn, and with its `RidgeCV`;
- the logistic probe's cross-validation over ten penalties and five folds with fits of scikit-learn.
"""

import numpy as np
import torch
import torch.nn.functional as F
from side_by_side import Comparison, compare, write
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from etude.core.replicas import Replicas
from etude.merge import concatenate, probe, ridge_path
from etude.models import five_conv_net, mlp

MEMBERS, ROWS = 10, 10_000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def perceptron(seed: int) -> nn.Module:
    return mlp([196, 32, 32, 5], torch.Generator().manual_seed(seed)).eval().to(DEVICE)


def convolutional(seed: int) -> nn.Module:
    network = five_conv_net(
        torch.Generator().manual_seed(seed), channels=1, widths=(8, 16), kernels=(3, 3), pooled=(0,)
    )
    return network.eval().to(DEVICE)


def features() -> list[Comparison]:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(ROWS, 1, 14, 14, generator=draw).to(DEVICE)
    found = []
    for words, make, rows, size in (
        ("perceptrons, batches of 16", perceptron, images, 16),
        ("perceptrons, batches of 1000", perceptron, images, 1000),
        ("convolutional networks, batches of 1000", convolutional, images[:2000], 1000),
    ):
        members = [make(seed) for seed in range(MEMBERS)]
        trunks = [nn.Sequential(*list(member.children())[:-1]) for member in members]
        cat = concatenate(Replicas(members), head=None)
        batches = list(rows.split(size))

        def ours(cat=cat, batches=batches) -> Tensor:
            return cat.extract(batches)

        @torch.no_grad()
        def theirs(trunks=trunks, batches=batches) -> Tensor:
            return torch.cat([torch.cat([trunk(batch) for trunk in trunks], 1).cpu() for batch in batches])

        difference = (ours() - theirs()).abs().max().item()
        found.append(
            compare(
                f"features of ten {words}",
                "a loop over the members and torch.cat",
                ours,
                theirs,
                repeats=3,
                aim=0.5,
                agreement=f"largest difference {difference:.1e}",
            )
        )
    return found


def probes() -> list[Comparison]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (2000,), generator=draw)
    rows = (torch.randn(5, 320, generator=draw)[labels] + 6 * torch.randn(2000, 320, generator=draw)).double()
    targets = F.one_hot(labels, 5).double()
    penalties = np.logspace(-4, 2, 20)

    def ours() -> Tensor:
        return ridge_path(rows, targets, penalties.tolist())[0]

    def theirs() -> np.ndarray:
        return np.stack([Ridge(alpha=2000 * p).fit(rows.numpy(), targets.numpy()).coef_.T for p in penalties])

    def theirs_cv() -> float:
        return RidgeCV(alphas=2000 * penalties).fit(rows.numpy(), targets.numpy()).alpha_

    difference = np.abs(ours().numpy() - theirs()).max()
    chosen = penalties[int(ridge_path(rows, targets, penalties.tolist())[2].argmin())]
    work = "ridge probe at twenty penalties, 2000 rows of 320 features"
    small, answers, grid = rows[:200, :128], labels[:200], np.logspace(-3, 1.5, 10)
    splits = list(StratifiedKFold(5, shuffle=True, random_state=0).split(small, answers))

    def by_fits() -> float:
        losses = []
        for p in grid:
            total = 0.0
            for inside, outside in splits:
                mean, scale = small[inside].mean(0), small[inside].std(0, correction=0)
                fitted = LogisticRegression(C=1 / (len(inside) * p), max_iter=1000)
                fitted.fit(((small[inside] - mean) / scale).numpy(), answers[inside].numpy())
                logarithm = fitted.predict_log_proba(((small[outside] - mean) / scale).numpy())
                total -= logarithm[np.arange(len(outside)), answers[outside].numpy()].sum()
            losses.append(total / len(small))
        return float(grid[int(np.argmin(losses))])

    ours_grid = probe(small, answers, penalties=grid.tolist())
    return [
        compare(work, "twenty fits of scikit-learn's Ridge", ours, theirs, aim=0.2, agreement=f"{difference:.1e}"),
        compare(
            f"{work}, chosen by leaving one out",
            "scikit-learn's RidgeCV",
            ours,
            theirs_cv,
            agreement=f"chosen: {chosen:.3g} and {theirs_cv() / 2000:.3g}",
        ),
        compare(
            "logistic probe, ten penalties by five folds, 200 rows of 128 features",
            "fifty fits of scikit-learn's LogisticRegression, and the last",
            lambda: probe(small, answers, penalties=grid.tolist()),
            by_fits,
            repeats=3,
            agreement=f"chosen: {ours_grid.penalty:.3g} and {by_fits():.3g}",
        ),
    ]


if __name__ == "__main__":
    write("concatenated_representations", features() + probes())
