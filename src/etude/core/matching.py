r"""Compare two sets of units: streamed correlations, one-to-one assignment, transport plans, and CKA.

Tables are ``(samples, units)``: one column a unit, as `etude.core.sites.units` makes them.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from etude.core.checks import InputError, check_at_least, check_one_of

__all__ = ["Moments", "assign", "cka", "correlation", "transport"]

KERNELS = ("linear", "rbf")
CONSTANT = 1e-12
"""A unit whose deviation is below this share of its mean is constant: what is left is rounding."""

MEDIAN_ROWS = 2048
BLOCK_ELEMENTS = 1 << 24


class Moments:
    r"""Means and covariances of units, streamed over batches.

    Each batch is centred by itself in float64 and merged by Chan's update, so that neither the split into batches
    nor a large common offset costs digits. To relate the units of several networks, concatenate their columns.

    >>> moments = Moments()
    >>> for batch in torch.arange(12.0).view(3, 2, 2):
    ...     moments.update(batch)
    >>> moments.count, moments.mean.tolist(), moments.correlation()[0, 1].item()
    (6, [5.0, 6.0], 1.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._products: Tensor | None = None

    def update(self, table: Float[Tensor, "samples units"]) -> None:
        """Take in a batch; the sums stay on its device.

        Raises:
            InputError: for no rows, another number of units than before, or a value that is not finite.
        """
        if not len(table) or (self._mean is not None and table.shape[1] != len(self._mean)):
            held = "any" if self._mean is None else str(len(self._mean))
            raise InputError(
                f"got {tuple(table.shape)}", where="table", instead=f"give rows of samples with {held} units"
            )
        values = table.detach().to(torch.float64, copy=True)
        mean = values.mean(0)
        if not bool(torch.isfinite(mean).all()):  # one such value makes its unit's mean so too
            raise InputError(
                "holds a value that is not finite", where="table", instead="look for the site that overflows"
            )
        centred = values.sub_(mean)
        self._shift(len(values), mean).addmm_(centred.T, centred)

    def merge(self, other: "Moments") -> None:
        """Take in what another has seen of the same units, as if its batches had come here.

        Raises:
            InputError: if it has seen nothing yet, or another number of units.
        """
        mean, seen = other._filled()
        if self._mean is not None and len(mean) != len(self._mean):
            raise InputError(f"{len(mean)} units", where="other", instead=f"give moments of {len(self._mean)} units")
        self._shift(other.count, mean).add_(seen)

    def _shift(self, count: int, mean: Tensor) -> Tensor:
        """Move to the common mean with ``count`` further samples, and return the products to add theirs to."""
        if self._mean is None or self._products is None:
            self._mean, self._products = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        shift = mean - self._mean
        total = self.count + count
        self._mean = self._mean + shift * (count / total)
        self._products.addr_(shift, shift, alpha=self.count * count / total)
        self.count = total
        return self._products

    @property
    def mean(self) -> Float[Tensor, "units"]:
        """The units' means, float64."""
        return self._filled()[0]

    @property
    def covariance(self) -> Float[Tensor, "units units"]:
        """The covariance (divided by the count), float64."""
        return self._filled()[1] / self.count

    @property
    def deviation(self) -> Float[Tensor, "units"]:
        """The units' standard deviations, float64."""
        return (self._filled()[1].diagonal() / self.count).clamp(min=0).sqrt()

    @property
    def constant(self) -> Bool[Tensor, "units"]:
        """Which units never changed: their correlations are undefined."""
        return self.deviation <= CONSTANT * self.mean.abs()

    def correlation(self, rows: slice = slice(None), columns: slice = slice(None)) -> Float[Tensor, "rows columns"]:
        """Pearson correlations of some units with others, by default of all; NaN where a unit is constant."""
        scale = self.deviation.masked_fill(self.constant, torch.nan)
        covariance = self._filled()[1][rows, columns] / self.count
        return (covariance / torch.outer(scale[rows], scale[columns])).clamp(-1, 1)

    def _filled(self) -> tuple[Tensor, Tensor]:
        if self._mean is None or self._products is None:
            raise InputError("no batch yet", where="Moments", instead="call update first")
        return self._mean, self._products


def correlation(x: Float[Tensor, "samples n"], y: Float[Tensor, "same_samples m"]) -> Float[Tensor, "n m"]:
    """Pearson correlations between the units of two tables seen on the same samples; NaN where one is constant.

    Computed in float64; to stream over batches use `Moments`.

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
    >>> [round(value, 3) for value in correlation(x, x)[0].tolist()]
    [1.0, -0.866]
    """
    _check_same_samples(x, y)
    return (_standardised(x).T @ _standardised(y) / len(x)).clamp(-1, 1)


def assign(similarity: Float[Tensor, "n m"]) -> Int64[Tensor, "n"]:
    r"""The one-to-one assignment :math:`\pi` of rows to columns that maximises :math:`\sum_i s_{i \pi(i)}`.

    With more rows than columns the rows left over get -1; with more columns, columns are left over.

    Args:
        similarity: finite values; give ``-cost`` to minimise a cost.

    >>> assign(torch.tensor([[0.9, 0.8], [0.7, 0.1], [0.0, 0.0]])).tolist()
    [1, 0, -1]
    """
    if not bool(torch.isfinite(similarity).all()):
        raise InputError(
            "holds a value that is not finite", where="similarity", instead="leave constant units out of the matching"
        )
    rows, columns = linear_sum_assignment(similarity.detach().double().cpu().numpy(), maximize=True)
    matched = np.full(len(similarity), -1, dtype=np.int64)
    matched[rows] = columns
    return torch.from_numpy(matched).to(similarity.device)


def transport(
    cost: Float[Tensor, "n m"],
    source: Float[Tensor, "n"] | None = None,
    target: Float[Tensor, "m"] | None = None,
    *,
    regularisation: float = 0.0,
    steps: int = 10_000,
) -> Float[Tensor, "n m"]:
    r"""The plan :math:`T` of least cost that moves the masses ``source`` onto ``target``.

    :math:`\min_T \langle T, C \rangle - \epsilon H(T)` with row sums ``source`` and column sums ``target``: exact
    (network simplex) for :math:`\epsilon = 0`, else by Sinkhorn iterations in the log domain, through which
    gradients flow.

    Args:
        cost: what a unit of mass pays from row to column.
        source: masses of the rows; uniform by default.
        target: masses of the columns; uniform by default.
        regularisation: :math:`\epsilon`, in the units of ``cost``.
        steps: at most so many Sinkhorn iterations; POT warns if they did not suffice.

    Raises:
        InputError: for masses that are negative or do not sum alike, or a cost that is not finite.

    >>> (2 * transport(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    check_at_least("regularisation", regularisation, 0.0)
    if not bool(torch.isfinite(cost).all()):
        raise InputError("holds a value that is not finite", where="cost", instead="leave constant units out")
    masses = [
        cost.new_full((size,), 1 / size) if given is None else given
        for given, size in ((source, cost.shape[0]), (target, cost.shape[1]))
    ]
    for name, mass in zip(("source", "target"), masses, strict=True):
        if bool((mass < 0).any()) or not torch.isclose(mass.sum(), masses[0].sum(), rtol=1e-4):
            raise InputError(
                f"masses sum to {float(mass.sum()):g}, the smallest is {float(mass.min()):g}",
                where=name,
                instead="give non-negative masses that sum alike",
            )
    import ot  # takes seconds to import

    if regularisation == 0:
        exact = [value.detach().double().cpu().numpy() for value in (*masses, cost)]
        plan = ot.emd(exact[0], exact[1] * (exact[0].sum() / exact[1].sum()), exact[2], numItermax=10_000_000)
        return torch.from_numpy(plan).to(cost)
    # The marginals cannot come closer than the precision allows.
    tolerance = max(1e-9, 10 * torch.finfo(cost.dtype).eps)
    return ot.sinkhorn(*masses, cost, regularisation, method="sinkhorn_log", numItermax=steps, stopThr=tolerance)


def cka(
    x: Float[Tensor, "samples n"],
    y: Float[Tensor, "same_samples m"],
    *,
    kernel: str = "linear",
    debiased: bool = True,
    bandwidth: float = 0.4,
) -> Float[Tensor, ""]:
    r"""Centred kernel alignment, :math:`\text{HSIC}(K, L) / \sqrt{\text{HSIC}(K, K)\,\text{HSIC}(L, L)}`.

    1 for tables that agree up to rotation and scale; near 0 for unrelated ones if debiased, above it if not.

    Args:
        x: one table; its units need not be as many as ``y``'s.
        y: the other, on the same samples.
        kernel: ``linear``, or ``rbf``: :math:`e^{-d^2 / 2 \sigma^2}`.
        debiased: use the unbiased estimator of HSIC (Song et al., 2012), for which few samples are no reason to look
            similar; it can be slightly negative.
        bandwidth: for ``rbf``, :math:`\sigma` as a share of the median distance between samples (of the first 2048).

    Kornblith, Norouzi, Lee and Hinton, Similarity of Neural Network Representations Revisited, ICML 2019.

    >>> table = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> round(cka(table, -3 * table + 1).item(), 6)
    1.0
    """
    _check_same_samples(x, y)
    check_one_of("kernel", kernel, KERNELS)
    check_at_least("bandwidth", bandwidth, 0.0, strict=True)
    if len(x) < 4:
        raise InputError(f"got {len(x)} samples", where="table", instead="give at least 4")
    first, second = (
        _Kernel(centred, bandwidth * torch.pdist(centred[:MEDIAN_ROWS]).median() if kernel == "rbf" else None)
        for centred in (table.double() - table.double().mean(0) for table in (x, y))
    )
    scale = (_hsic(first, first, debiased) * _hsic(second, second, debiased)).sqrt()
    return (_hsic(first, second, debiased) / scale).to(x.dtype)


class _Kernel(NamedTuple):
    """A centred table with the kernel on it: radial of a given scale, or linear."""

    table: Tensor
    scale: Tensor | None

    def block(self, rows: Tensor) -> Tensor:
        """Some rows of the radial kernel's matrix."""
        return torch.exp(-torch.cdist(self.table[rows], self.table).square() / (2 * self.scale**2))  # type: ignore[operator]


def _hsic(x: _Kernel, y: _Kernel, debiased: bool) -> Tensor:
    """HSIC up to a factor that cancels in CKA, from tr(KL) and the kernels' row sums."""
    count = len(x.table)
    sums = _linear_sums if x.scale is None else _radial_sums
    trace, rows_x, rows_y = sums(x, y, not debiased)
    both, totals = rows_x @ rows_y, rows_x.sum() * rows_y.sum()
    if debiased:  # Song et al. (2012), eq. 5; the diagonals are left out of the sums
        return trace + totals / ((count - 1) * (count - 2)) - 2 / (count - 2) * both
    return trace + totals / count**2 - 2 / count * both


def _linear_sums(x: _Kernel, y: _Kernel, diagonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of the linear kernels without forming them: memory is that of the tables."""
    tables = (x.table, y.table)
    trace = (x.table.T @ y.table).square().sum()
    rows = [table @ table.sum(0) for table in tables]
    if not diagonal:
        own = [table.square().sum(1) for table in tables]
        trace = trace - own[0] @ own[1]
        rows = [row - each for row, each in zip(rows, own, strict=True)]
    return trace, rows[0], rows[1]


def _radial_sums(x: _Kernel, y: _Kernel, diagonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of the radial kernels, a block of rows at a time."""
    count = len(x.table)
    trace, sums = x.table.new_zeros(()), []
    for rows in torch.arange(count, device=x.table.device).split(max(BLOCK_ELEMENTS // count, 1)):
        blocks = [x.block(rows), y.block(rows)]
        if not diagonal:
            for block in blocks:
                block[torch.arange(len(rows)), rows] = 0
        trace = trace + (blocks[0] * blocks[1]).sum()
        sums.append(torch.stack([block.sum(1) for block in blocks]))
    rows_x, rows_y = torch.cat(sums, dim=1)
    return trace, rows_x, rows_y


def _standardised(table: Tensor) -> Tensor:
    values = table.double()
    mean = values.mean(0)
    centred = values - mean
    deviation = centred.square().mean(0).sqrt()
    return centred / deviation.masked_fill(deviation <= CONSTANT * mean.abs(), torch.nan)


def _check_same_samples(x: Tensor, y: Tensor) -> None:
    if len(x) != len(y):
        raise InputError(
            f"{len(x)} samples and {len(y)}", where="tables", instead="show both networks the same samples in one order"
        )
