"""Rounding to integers: to the nearest, or up or down by chance."""

import torch
from jaxtyping import Float
from torch import Tensor

from etude.core.checks import check_one_of

__all__ = ["ROUNDINGS", "rounded"]

ROUNDINGS = ("nearest", "nearest_away", "stochastic")


def rounded(
    x: Float[Tensor, "*shape"], rounding: str = "nearest", generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    r"""Integers near ``x``, in the same dtype.

    Args:
        x: any values.
        rounding: ``nearest``, halves to the even neighbour, as `torch.round`, ONNX and IEEE 754 do;
            ``nearest_away``, halves away from zero, as C's ``round`` and much integer hardware do; or
            ``stochastic``, :math:`\lceil x \rceil` with probability :math:`x - \lfloor x \rfloor`, else
            :math:`\lfloor x \rfloor` (survey, eq. 8), which is right on average.
        generator: of the draws, on the device of ``x``; torch's default one if not given.

    >>> values = torch.tensor([0.5, 1.5, -0.5, 2.3])
    >>> rounded(values).tolist(), rounded(values, "nearest_away").tolist()
    ([0.0, 2.0, -0.0, 2.0], [1.0, 2.0, -1.0, 2.0])
    """
    check_one_of("rounding", rounding, ROUNDINGS)
    if rounding == "nearest":
        return x.round()
    if rounding == "nearest_away":
        # Not floor(|x| + .5): that sum rounds .49999997 up.
        whole = x.trunc()
        return whole + ((x - whole).abs() >= 0.5).to(x) * x.sign()
    below = x.floor()
    # With 24 bits a draw never equals 1, and integers stay as they are.
    draws = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return below + (draws < x - below).to(x)
