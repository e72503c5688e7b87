"""Distributions over sizes, and draws from them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from etude.compress.nested.axes import Size
from etude.core.checks import InputError, check_at_least

__all__ = ["NAMED", "RATIO", "Distribution", "chances", "draw"]

Distribution = str | Mapping[Size, float] | Sequence[float] | Tensor | Callable[[Size], float]

NAMED = ("uniform", "always_full", "proportional", "geometric")
RATIO = 0.9
"""Of the chances of an axis's next larger choice and this one, where a distribution is geometric."""


def chances(
    sizes: Sequence[Size], weights: Mapping[Size, float] | Sequence[float] | Tensor | Callable[[Size], float]
) -> Float64[Tensor, "sizes"]:
    """The chance of each size, in double precision.

    Args:
        sizes: all of them, in order.
        weights: by size (0 for those left out), in order, or a function of a size.

    Raises:
        InputError: for weights that are negative, all zero, or of another number.

    >>> chances([Size(width=1), Size(width=2)], lambda size: 1 / size["width"]).tolist()
    [0.6666666666666666, 0.3333333333333333]
    """
    if isinstance(weights, Mapping):
        unknown = [size for size in weights if size not in set(sizes)]
        if unknown:
            raise InputError(f"{unknown[0]} is no size of the space", where="distribution", instead="see list(space)")
        values = [float(weights.get(size, 0.0)) for size in sizes]
    else:
        values = [float(weights(size)) for size in sizes] if callable(weights) else [float(each) for each in weights]
    found = torch.tensor(values, dtype=torch.float64)
    if len(found) != len(sizes):
        raise InputError(
            f"got {len(found)} weights for {len(sizes)} sizes", where="distribution", instead="give one for each size"
        )
    if not (found.isfinite().all() and (found >= 0).all() and found.sum() > 0):
        raise InputError("got weights that are no chances", where="distribution", instead="give weights from 0 up")
    return found / found.sum()


def draw(
    sizes: Sequence[Size],
    chance: Float64[Tensor, "sizes"],
    count: int,
    *,
    generator: torch.Generator,
    replacement: bool,
    certain: Sequence[Size] = (),
) -> list[Size]:
    """``count`` sizes: the ``certain`` ones, then draws, independent or (without ``replacement``) all different.

    >>> sizes, order = [Size(a=1), Size(a=2)], torch.Generator()
    >>> draw(sizes, chances(sizes, [0, 1]), 2, generator=order, replacement=True)
    [Size(a=2), Size(a=2)]
    """
    check_at_least("count", count, 1)
    if not replacement:
        chance = torch.tensor(
            [0.0 if size in certain else float(each) for size, each in zip(sizes, chance, strict=True)]
        )
    missing, possible = count - len(certain), int((chance > 0).sum())
    if not replacement and missing > possible:
        raise InputError(
            f"cannot draw {count} different sizes of {possible + len(certain)}",
            where="count",
            instead="draw fewer, or with replacement",
        )
    if missing <= 0:
        return list(certain)[:count]
    drawn = torch.multinomial(chance, missing, replacement, generator=generator).tolist()
    return [*certain, *(sizes[index] for index in drawn)]
