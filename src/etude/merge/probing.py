r"""Linear probes: how much a linear layer finds in given features.

`probe` standardises the features and fits a linear classifier whose penalty is chosen by cross-validation on the same
rows; all folds and penalties are solved at once. `ridge_path` gives the least-squares probe at many penalties for the
price of one eigendecomposition. `few_shot` measures features by episodes,
`evaluate_by_environment` by environment, and `invariant_probe` fits one layer that does equally well in all of them.

Penalties have one meaning everywhere: the objective is the mean loss of the rows plus :math:`\frac{\lambda}{2}
\|W\|^2`; the bias is free. scikit-learn's are ``C = 1 / (rows * penalty)`` and, for ridge, ``alpha = rows * penalty``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from etude.core.checks import InputError, check_at_least, check_one_of

__all__ = [
    "PENALTIES",
    "LinearHead",
    "evaluate_by_environment",
    "invariant_probe",
    "probe",
    "ridge_path",
]

PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-6, 4))
"""From 0.001 to 32: the right one grows with the number of members, so the grid is wide."""
LOSSES = ("logistic", "ridge")
ITERATIONS, HALVINGS, MEMORY = 500, 20, 10
COARSE, FINE = 1e-4, {torch.float32: 1e-6, torch.float64: 1e-9}
"""Tolerances: to compare penalties, and for the layer that is returned."""


class LinearHead(nn.Module):
    """A linear layer on standardised features; made by `probe`, usable as the head of a `Concatenation`.

    Args:
        mean: of each feature.
        scale: standard deviation of each feature, 1 for a dead one.
        weight: ``(classes, features)``, on standardised features.
        bias: ``(classes,)``.
        penalty: the penalty it was fitted with.
        scores: for each penalty tried, its mean loss on rows that were held out.
        dead: number of features that are constant on the rows it was fitted on (with weight decay many ReLU units
            end so).

    Shape:
        ``(batch, features)`` to ``(batch, classes)``.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        mean: Float[Tensor, "features"],
        scale: Float[Tensor, "features"],
        weight: Float[Tensor, "classes features"],
        bias: Float[Tensor, "classes"],
        *,
        penalty: float = 0.0,
        scores: Mapping[float, float] | None = None,
        dead: int = 0,
    ):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.penalty = penalty
        self.scores = dict(scores or {})
        self.dead = dead

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Class scores."""
        return F.linear((features.to(self.mean) - self.mean) / self.scale, self.weight, self.bias)

    @torch.no_grad()
    def accuracy(self, features: Float[Tensor, "rows features"], labels: Int64[Tensor, "_"]) -> float:
        """Share of rows whose highest score is their label's."""
        return float((self(features).argmax(1) == labels).double().mean())

    def extra_repr(self) -> str:
        """Sizes, penalty and dead features."""
        classes, features = self.weight.shape
        return f"features={features}, classes={classes}, penalty={self.penalty:.3g}, dead={self.dead}"


def probe(
    features: Float[Tensor, "rows features"],
    labels: Int64[Tensor, "_"],
    *,
    loss: str = "logistic",
    penalties: Sequence[float] | float = PENALTIES,
    folds: int = 5,
    standardise: bool = True,
    classes: int | None = None,
    generator: torch.Generator | None = None,
) -> LinearHead:
    """Fit a linear classifier on features, its penalty chosen on held-out parts of the same rows.

    Each fold is standardised by the rows it is fitted on. The penalty with the lowest mean held-out loss is taken, the
    larger of equals, and fitted on all rows.

    Args:
        features: e.g. from `Concatenation.extract`; half precision is computed in float32.
        labels: class of each row, from 0.
        loss: ``logistic``, multinomial; or ``ridge``, least squares on one-hot labels, whose held-out losses
            (leave one out) are in closed form.
        penalties: to choose from; a single one is taken as it is. Choose anew for every number of members: at equal
            penalty small and large representations are not compared fairly.
        folds: parts of equal class shares, for ``logistic``.
        standardise: whether to bring each feature to mean 0 and variance 1 (the paper's BatchNorm), or only to
            centre them.
        classes: their number, if not all occur.
        generator: CPU generator of the folds; seed 0 by default.

    Returns:
        A module from raw features to class scores.

    >>> features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    >>> head = probe(features, (features[:, 0] > 0).long())
    >>> head.accuracy(features, (features[:, 0] > 0).long()) > 0.9
    True
    """
    check_one_of("loss", loss, LOSSES)
    grid = _grid(penalties)
    x = _checked(features, labels, classes)
    count = classes or int(labels.max()) + 1
    mean, scale, dead = _standards(x, standardise)
    z = (x - mean) / scale
    if loss == "ridge":
        weights, biases, scores = _ridge(z, F.one_hot(labels, count).to(x), grid)
    else:
        if len(grid) > 1:
            scores = _held_out(x, labels, count, grid, folds, standardise, generator)
        else:
            scores = grid.new_zeros(1)
        best = _best(scores)
        every, tolerance = torch.ones_like(z[:, 0]), FINE[z.dtype]
        weights, biases = _logistic(z[None], labels[None], every[None], count, grid[best : best + 1], tolerance)
        weights, biases = weights[0], biases[0]
    best = _best(scores)
    chosen = best if loss == "ridge" else 0
    listed = {float(p): float(s) for p, s in zip(grid, scores, strict=True)} if len(grid) > 1 else {}
    return LinearHead(
        mean, scale, weights[chosen].T.contiguous(), biases[chosen], penalty=float(grid[best]), scores=listed, dead=dead
    )


def ridge_path(
    features: Float[Tensor, "rows features"],
    targets: Float[Tensor, "_ outputs"],
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Float[Tensor, "penalties features outputs"], Float[Tensor, "penalties outputs"], Float[Tensor, "penalties"]]:
    """Ridge regression at many penalties from one eigendecomposition, with leave-one-out errors in closed form.

    Where there are fewer rows than features, the decomposition is of the rows' Gram matrix. Features are centred, not
    scaled.

    Returns:
        For each penalty the weights, the biases, and the mean squared error of each row predicted without it.

    >>> weights, biases, errors = ridge_path(torch.eye(3), torch.eye(3), [0.1, 1.0])
    >>> weights.shape, biases.shape, errors.shape
    (torch.Size([2, 3, 3]), torch.Size([2, 3]), torch.Size([2]))
    """
    x = _raised(features)
    if len(x) != len(targets):
        raise InputError(f"{len(targets)} for {len(x)} rows", where="targets", instead="give one row for each")
    mean = x.mean(0)
    weights, biases, errors = _ridge(x - mean, targets.to(x), _grid(penalties).to(x))
    return weights, biases - mean @ weights, errors


@dataclass(frozen=True)
class ByEnvironment:
    """Accuracy by environment: the mean over all rows hides the worst.

    Attributes:
        accuracy: share of right answers, by environment.
        rows: number of rows, by environment.
    """

    accuracy: Mapping[int, float]
    rows: Mapping[int, int]

    @property
    def mean(self) -> float:
        """Mean over environments."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    @property
    def worst(self) -> float:
        """Lowest of any environment."""
        return min(self.accuracy.values())

    def summary(self) -> str:
        """A line for each environment."""
        lines = [f"environment {e}: {value:.3f} of {self.rows[e]} rows" for e, value in self.accuracy.items()]
        return "\n".join([*lines, f"mean {self.mean:.3f}, worst {self.worst:.3f}"])


@torch.no_grad()
def evaluate_by_environment(
    head: nn.Module,
    features: Float[Tensor, "rows features"],
    labels: Int64[Tensor, "_"],
    environments: Int64[Tensor, "_"],
) -> ByEnvironment:
    """Accuracy of a head in each environment: hospitals, domains, degrees of rotation.

    >>> found = evaluate_by_environment(nn.Identity(), torch.eye(2), torch.tensor([0, 0]), torch.tensor([3, 7]))
    >>> dict(found.accuracy), found.worst
    ({3: 1.0, 7: 0.0}, 0.0)
    """
    _check_rows("environments", environments, len(features))
    right = (head(features).argmax(1) == labels).double()
    names, index = environments.unique(return_inverse=True)
    rows = torch.bincount(index, minlength=len(names))
    share = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, right) / rows
    return ByEnvironment(
        dict(zip(names.tolist(), share.tolist(), strict=True)), dict(zip(names.tolist(), rows.tolist(), strict=True))
    )


def invariant_probe(
    features: Float[Tensor, "rows features"],
    labels: Int64[Tensor, "_"],
    environments: Int64[Tensor, "_"],
    *,
    variance: float = 1.0,
    penalty: float = 1e-2,
    standardise: bool = True,
    iterations: int = 200,
) -> LinearHead:
    r"""A linear probe whose loss is equal in all environments: vREx on frozen features.

    Minimises :math:`\bar{R} + \beta \operatorname{Var}_e(R_e) + \frac{\lambda}{2} \|W\|^2` over the linear layer by
    L-BFGS, from the solution with :math:`\beta = 0`; :math:`R_e` is the mean loss of environment e.

    Args:
        features: of the training environments.
        labels: class of each row.
        environments: environment of each row.
        variance: the weight beta; 0 is the mean over environments, ERM.
        penalty: the weight lambda.
        standardise: as in `probe`.
        iterations: of L-BFGS.

    D. Krueger et al., *Out-of-Distribution Generalization via Risk Extrapolation*, ICML 2021.

    >>> features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> head = invariant_probe(features, (features[:, 0] > 0).long(), torch.arange(40) % 2)
    >>> head(features).shape
    torch.Size([40, 2])
    """
    check_at_least("variance", variance, 0.0)
    _check_rows("environments", environments, len(features))
    head = probe(features, labels, penalties=penalty, standardise=standardise)
    x = (_raised(features) - head.mean) / head.scale
    names, index = environments.unique(return_inverse=True)
    if len(names) < 2:
        raise InputError("got one", where="environments", instead="give rows of at least two")
    rows = torch.bincount(index, minlength=len(names)).to(x)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        each = F.cross_entropy(F.linear(x, head.weight, head.bias), labels, reduction="none")
        risks = torch.zeros_like(rows).index_add(0, index, each) / rows
        objective = risks.mean() + variance * risks.var(correction=0) + penalty / 2 * head.weight.square().sum()
        objective.backward()
        return objective

    optimizer.step(closure)
    optimizer.zero_grad()
    return head


def _raised(features: Tensor) -> Tensor:
    # Sums of thousands of half-precision squares overflow.
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


def _checked(features: Tensor, labels: Tensor, classes: int | None) -> Tensor:
    x = _raised(features)
    _check_rows("labels", labels, len(x))
    if not x.isfinite().all():
        raise InputError("got NaN or infinity", where="features", instead="find the member that gives them")
    if int(labels.min()) < 0 or (classes is not None and int(labels.max()) >= classes):
        raise InputError(
            f"got classes from {int(labels.min())} to {int(labels.max())}",
            where="labels",
            instead="number them from 0" + (f" to {classes - 1}" if classes else ""),
        )
    return x


def _check_rows(name: str, values: Tensor, rows: int) -> None:
    if len(values) != rows or rows == 0:
        raise InputError(f"got {len(values)} for {rows} rows", where=name, instead="give one for each row")


def _grid(penalties: Sequence[float] | float) -> Tensor:
    grid = [penalties] if isinstance(penalties, (int, float)) else list(penalties)
    if not grid:
        raise InputError("got none", where="penalties", instead="give at least one")
    for value in grid:
        check_at_least("penalties", value, 0.0)
    return torch.tensor(grid, dtype=torch.float64)


def _standards(x: Tensor, standardise: bool) -> tuple[Tensor, Tensor, int]:
    """Mean and scale of each feature, and how many are constant."""
    deviation, mean = torch.std_mean(x, 0, correction=0)
    constant = deviation <= 1e-6 * (1e-6 + mean.abs() + deviation.max())
    scale = torch.where(constant, 1.0, deviation) if standardise else torch.ones_like(deviation)
    return mean, scale, int(constant.sum())


def _best(scores: Tensor) -> int:
    """The last of the lowest: of equals the larger penalty, where the grid rises."""
    return len(scores) - 1 - int(scores.flip(0).argmin())


def _principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of the rows (..., m, r) along orthogonal axes, and these axes (..., d, r); r = min(m, d).

    Losses depend on the rows alone and the penalty is a norm, so the solution lies in the rows' span, and along these
    axes the rows' covariance is diagonal.
    """
    basis = None
    if x.shape[-2] < x.shape[-1]:
        basis, lower = torch.linalg.qr(x.mT)
        x = lower.mT
    axes = torch.linalg.eigh(x.mT @ x / x.shape[-2]).eigenvectors
    return x @ axes, axes if basis is None else basis @ axes


def _ridge(z: Tensor, targets: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, biases and leave-one-out errors of centred rows at each penalty."""
    rows = len(z)
    mean = targets.mean(0)
    coordinates, axes = _principal(z)
    spread = coordinates.square().mean(0)
    shrink = 1 / (spread + grid.to(z)[:, None]).clamp(min=torch.finfo(z.dtype).tiny)
    inside = torch.where(spread > spread.max() * torch.finfo(z.dtype).eps * rows, shrink, 0.0)
    weights = inside[:, :, None] * (coordinates.T @ (targets - mean) / rows)
    residual = targets - mean - coordinates @ weights
    leverage = 1 / rows + inside @ coordinates.square().T / rows
    errors = (residual / (1 - leverage).clamp(min=1e-6)[:, :, None]).square().mean((1, 2))
    return axes @ weights, mean.expand(len(grid), -1).clone(), errors


def _held_out(
    x: Tensor,
    labels: Tensor,
    classes: int,
    grid: Tensor,
    folds: int,
    standardise: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Mean held-out loss at each penalty, all folds at once."""
    fold = _folds(labels, folds, generator)
    fitted = fold != torch.arange(folds, device=x.device)[:, None]
    parts = [(x - mean) / scale for mean, scale, _ in (_standards(x[each], standardise) for each in fitted)]
    z = torch.stack(parts)
    weights, biases = _logistic(z, labels.expand(folds, -1), fitted.to(x), classes, grid, COARSE)
    logits = z[:, None] @ weights + biases[:, :, None]
    losses = F.cross_entropy(
        logits.movedim(-1, 1), labels.expand(len(grid), -1).expand(folds, -1, -1), reduction="none"
    )
    return (losses * ~fitted[:, None]).sum((0, 2)) / len(x)


def _folds(labels: Tensor, folds: int, generator: torch.Generator | None) -> Tensor:
    """The fold of each row: every class is dealt out in turn."""
    if not 2 <= folds <= len(labels):
        raise InputError(
            f"got {folds} for {len(labels)} rows", where="folds", instead="give 2 or more, at most one for each row"
        )
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    shuffled = torch.randperm(len(labels), generator=draws).to(labels.device)
    order = shuffled[labels[shuffled].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(labels), device=labels.device) % folds
    return fold


def _logistic(
    z: Tensor, labels: Tensor, kept: Tensor, classes: int, grid: Tensor, tolerance: float
) -> tuple[Float[Tensor, "problems penalties features classes"], Float[Tensor, "problems penalties classes"]]:
    r"""Multinomial logistic regressions for several sets of rows and penalties at once.

    The Hessian of the mean loss is below :math:`\frac{1}{2} X^\top X / m` (Böhning, 1992), which is diagonal along
    principal axes: in units of its square root all directions curve alike, and L-BFGS takes few steps.

    Args:
        z: rows of each problem, (F, m, d), of mean 0 over those kept.
        labels: (F, m).
        kept: 1 for the rows that count, (F, m).
        classes: their number.
        grid: penalties (P,).
        tolerance: on the largest entry of the slope, in those units.
    """
    problems, penalty = len(z), grid.to(z)
    share = kept / kept.sum(1, keepdim=True)
    coordinates, axes = _principal(z * kept[:, :, None])
    spread = (coordinates.square() * share[:, :, None]).sum(1)
    curvature = (spread[:, None] / 2 + penalty[:, None]).clamp(min=torch.finfo(z.dtype).eps)
    unit = torch.cat([curvature, torch.full_like(curvature[..., :1], 0.5)], 2).rsqrt()[..., None]
    target = F.one_hot(labels, classes).to(z)[:, :, None]
    rows = torch.cat([coordinates, torch.ones_like(coordinates[..., :1])], 2)
    decay = penalty[:, None].repeat(1, rows.shape[2])
    decay[:, -1] = 0.0

    def evaluate(point: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and slope of each problem at a point in units of `unit`."""
        weights = point.view(problems, len(grid), -1, classes) * unit
        logits = (rows @ weights.transpose(1, 2).flatten(2)).unflatten(2, (len(grid), classes))
        logarithm = logits.log_softmax(-1)
        loss = -(logarithm * target).sum(-1).mul(share[:, :, None]).sum(1)
        error = (logarithm.exp() - target) * share[:, :, None, None]
        slope = (rows.mT @ error.flatten(2)).unflatten(2, (len(grid), classes)).transpose(1, 2)
        loss = loss + (decay[..., None] * weights.square()).sum((2, 3)) / 2
        return loss.flatten(), ((slope + decay[..., None] * weights) * unit).flatten(2).flatten(0, 1)

    start = z.new_zeros(problems * len(grid), rows.shape[2] * classes)
    found = _minimum(evaluate, start, tolerance).view(problems, len(grid), -1, classes) * unit
    return axes[:, None] @ found[:, :, :-1], found[:, :, -1]


def _minimum(evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], point: Tensor, tolerance: float) -> Tensor:
    """Minimise several convex functions side by side by L-BFGS, each with its own step length.

    Args:
        evaluate: from points (P, n) to losses (P,) and slopes (P, n).
        point: where to start, (P, n).
        tolerance: on the largest entry of a slope; each function rests from there on.
    """
    loss, slope = evaluate(point)
    memory: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(ITERATIONS):
        active = slope.abs().amax(1) > tolerance
        if not active.any():
            break
        direction = -_times_inverse_hessian(memory, slope)
        step = active.to(point)
        descent = (direction * slope).sum(1)
        for _ in range(HALVINGS):
            ahead = point + step[:, None] * direction
            new_loss, new_slope = evaluate(ahead)
            enough = new_loss <= loss + 1e-4 * step * descent + 4 * torch.finfo(loss.dtype).eps * loss.abs()
            if enough.all():
                break
            step = torch.where(enough, step, step / 2)
        moved, turned = ahead - point, new_slope - slope
        curved = (moved * turned).sum(1)
        memory = [*memory[1 - MEMORY :], (moved, turned, torch.where(curved > 0, 1 / curved, 0.0))]
        stuck = (moved.abs().amax(1) == 0) & active
        point, loss, slope = ahead, new_loss, torch.where(stuck[:, None], 0.0, new_slope)
    return point


def _times_inverse_hessian(memory: list[tuple[Tensor, Tensor, Tensor]], slope: Tensor) -> Tensor:
    """The two-loop recursion of L-BFGS (Nocedal and Wright, algorithm 7.4), for each function by itself."""
    result, factors = slope, []
    for moved, turned, inverse in reversed(memory):
        factors.append(inverse * (moved * result).sum(1))
        result = result - factors[-1][:, None] * turned
    if memory:
        _, turned, inverse = memory[-1]
        size = inverse * turned.square().sum(1)
        result = result * torch.where(size > 0, 1 / size, 1.0)[:, None]
    for (moved, turned, inverse), factor in zip(memory, reversed(factors), strict=True):
        result = result + (factor - inverse * (turned * result).sum(1))[:, None] * moved
    return result
