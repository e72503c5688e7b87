"""Vector codebooks: k-means on runs of weights, weighted by importance or by what the layer's inputs look like."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from etude.core.codes import kmeans, nearest_codes

__all__ = ["assign", "fit_codebook"]

BLOCK_ELEMENTS = 1 << 24


def assign(
    runs: Float[Tensor, "rows columns dim"],
    books: Float[Tensor, "books entries dim"],
    metric: Float[Tensor, "columns dim dim"] | None = None,
) -> Int64[Tensor, "rows columns"]:
    r"""The entry nearest to each vector in its column's codebook, by :math:`(v - c)^\top G (v - c)`.

    >>> assign(torch.tensor([[[0.1], [0.9]]]), torch.tensor([[[0.0], [1.0]]])).tolist()
    [[0, 1]]
    """
    if metric is None and len(books) == 1:
        return nearest_codes(runs, books[0])
    points = runs.transpose(0, 1)
    skewed = points if metric is None else points @ metric
    books = books.expand(runs.shape[1], -1, -1)
    own = (books.square() if metric is None else books * (books @ metric)).sum(-1)
    step = max(BLOCK_ELEMENTS // (books.shape[1] * len(books)), 1)
    found = [(own.unsqueeze(1) - 2 * part @ books.mT).argmin(-1) for part in skewed.split(step, dim=1)]
    return torch.cat(found, 1).T


@torch.no_grad()
def fit_codebook(
    runs: Float[Tensor, "rows columns dim"],
    entries: int,
    *,
    generator: torch.Generator,
    shared: bool,
    importance: Float[Tensor, "rows columns dim"] | None = None,
    metric: Float[Tensor, "columns dim dim"] | None = None,
    steps: int = 50,
) -> Float[Tensor, "books entries dim"]:
    r"""Codebooks of least (weighted) squared error.

    Args:
        runs: vectors.
        entries: of each codebook.
        generator: of the starts.
        shared: one codebook for all columns, rather than one for each.
        importance: a weight for each value: minimises :math:`\sum_i h_i (v_i - c_i)^2`.
        metric: a matrix G for each column: minimises :math:`\sum (v - c)^\top G (v - c)`.
        steps: at most so many rounds of the weighted algorithm, after plain k-means.
    """
    whitened = None
    if metric is not None and (len(metric) == 1 or not shared):
        whitened = _root(metric)
    columns = runs.transpose(0, 1) if whitened is None else runs.transpose(0, 1) @ whitened
    tables = [columns.flatten(0, 1)] if shared else list(columns)
    books = torch.stack([kmeans(table, entries, generator=generator)[0] for table in tables])
    if importance is not None:
        weights = importance.transpose(0, 1)
        parts = [weights.flatten(0, 1)] if shared else list(weights)
        pairs = zip(tables, parts, books, strict=True)
        return torch.stack([_weighted_lloyd(table, part, book, steps) for table, part, book in pairs])
    if whitened is not None:
        return torch.linalg.solve(whitened, books, left=False)
    return books if metric is None else _metric_lloyd(runs, books, metric, steps)


def _root(metric: Tensor) -> Tensor:
    r"""R with :math:`G = R R^\top`: distances under G are Euclidean ones between rows v R."""
    precise = metric.double()
    size = precise.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    ridge = 1e-6 * size[:, None, None] * torch.eye(metric.shape[-1], dtype=torch.float64, device=metric.device)
    return torch.linalg.cholesky(precise + ridge).to(metric.dtype)


def _weighted_lloyd(points: Tensor, weights: Tensor, codes: Tensor, steps: int) -> Tensor:
    """k-means where every value of every point has its own weight."""
    least = torch.inf
    best = codes
    for _ in range(steps):
        # sum_i h_i (v_i - c_i)^2 without its part that no code changes.
        distances = weights @ codes.square().T - 2 * (weights * points) @ codes.T
        found, labels = distances.min(1)
        spread = float(found.double().sum())
        if spread >= least:
            break
        best, least = codes, spread
        mass = torch.zeros_like(codes).index_add_(0, labels, weights)
        moment = torch.zeros_like(codes).index_add_(0, labels, weights * points)
        codes = torch.where(mass > 0, moment / mass.clamp(min=torch.finfo(mass.dtype).tiny), codes)
    return best


def _metric_lloyd(runs: Tensor, books: Tensor, metric: Tensor, steps: int) -> Tensor:
    r"""k-means of one codebook under a metric of its own in each column.

    The best code solves :math:`(\sum_j n_j G_j)\, c = \sum_j G_j \sum_{v \in j} v`.
    """
    entries, dim = books.shape[1:]
    columns = runs.shape[1]
    offsets = entries * torch.arange(columns, device=runs.device)
    ridge = torch.eye(dim, device=runs.device, dtype=torch.float64)
    before = None
    for _ in range(steps):
        labels = assign(runs, books, metric)
        if before is not None and torch.equal(before, labels):
            break
        before = labels
        places = (labels + offsets).flatten()
        number = places.bincount(minlength=columns * entries).view(columns, entries).double()
        sums = torch.zeros(columns * entries, dim, dtype=torch.float64, device=runs.device)
        sums.index_add_(0, places, runs.flatten(0, 1).double())
        left = torch.einsum("jk,jab->kab", number, metric.double())
        right = torch.einsum("jab,jkb->ka", metric.double(), sums.view(columns, entries, dim))
        size = left.diagonal(dim1=1, dim2=2).mean(1)
        solved = torch.linalg.solve(left + (1e-9 * size + 1e-30)[:, None, None] * ridge, right)
        solved = solved.to(books.dtype)
        books = torch.where((number.sum(0) > 0).unsqueeze(1), solved, books[0]).unsqueeze(0)
    return books
