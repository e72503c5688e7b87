r"""Arithmetic on integers alone: dyadic scaling, products, and the non-linear functions of I-BERT.

A real number r is held as an integer q on a *grid* of scale S: :math:`r \approx S q`. Scales are known beforehand;
at run time there are only integer sums, products, shifts, comparisons and quotients.

Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018;
Yao et al., HAWQ-V3, ICML 2021; Kim et al., I-BERT, ICML 2021.
"""

import math
from functools import cache

import torch
from jaxtyping import Float, Int8, Int32, Int64, Integer
from torch import Tensor

from etude.core.checks import InputError

__all__ = [
    "dyadic",
    "integer_exp",
    "integer_gelu",
    "integer_layer_norm",
    "integer_matmul",
    "integer_sigmoid",
    "integer_softmax",
    "integer_sqrt",
    "integer_tanh",
    "rescale",
    "ties_possible",
]

ERF_SCALE, ERF_SHIFT = -0.2888, -1.769
r"""a and b of :math:`\text{erf}(x) \approx \text{sgn}(x)\,[a(\min(|x|, -b) + b)^2 + 1]` (I-BERT, eq. 8)."""
EXP_SCALE, EXP_SHIFT, EXP_OFFSET = 0.3585, 1.353, 0.344
r"""a, b and c of :math:`\exp(p) \approx a (p + b)^2 + c` for p from -ln 2 to 0 (I-BERT, eq. 13)."""
LARGEST_SHIFT = 62


def dyadic(factor: Float[Tensor, "*shape"]) -> tuple[Int64[Tensor, "*shape"], Int64[Tensor, "*shape"]]:
    r"""m and n such that :math:`m / 2^n` is ``factor`` to within :math:`2^{-31}` of it, m a signed 32-bit integer.

    Raises:
        InputError: for a factor of 2^30 or more, or one that is not finite.

    >>> [part.item() for part in dyadic(torch.tensor(0.75))]
    [1610612736, 31]
    """
    mantissa, exponent = torch.frexp(factor.double())
    multiplier = (mantissa * 2.0**31).round().long()
    # A mantissa just below 1 may round up to it.
    full = multiplier.abs() == 2**31
    multiplier, exponent = torch.where(full, multiplier // 2, multiplier), exponent.long() + full.long()
    shift = 31 - exponent
    if not bool(torch.isfinite(factor).all()) or bool((shift < 1).any()):
        raise InputError(f"got {float(factor.abs().max()):g}", where="factor", instead="give finite ones below 2^30")
    excess = (shift - LARGEST_SHIFT).clamp(min=0, max=LARGEST_SHIFT)
    return multiplier >> excess, shift - (shift - LARGEST_SHIFT).clamp(min=0)


def rescale(
    x: Integer[Tensor, "*shape"], multiplier: Int64[Tensor, "..."], shift: Int64[Tensor, "..."]
) -> Int64[Tensor, "*shape"]:
    r""":math:`\text{round}(x\, m / 2^n)`, halves to even as everywhere: one product, sums and shifts.

    >>> rescale(torch.tensor([1, 2, 3, 5]), torch.tensor(1), torch.tensor(1)).tolist()
    [0, 1, 2, 2]
    """
    product = x.long() * multiplier
    odd = (product >> shift).bitwise_and_(1)
    return product.add_(odd.add_((1 << shift - 1) - 1)).bitwise_right_shift_(shift)


def ties_possible(multiplier: Int64[Tensor, "*shape"], shift: Int64[Tensor, "*shape"]) -> bool:
    r"""Whether :math:`x\, m / 2^n` can lie halfway between two integers for any x of 32 bits.

    It takes an x with as many factors 2 as n - 1 has more than m. Where it cannot, halves need no care.

    >>> ties_possible(torch.tensor(1), torch.tensor(4)), ties_possible(torch.tensor(3), torch.tensor(40))
    (True, False)
    """
    lowest_bit = (multiplier & -multiplier).clamp(min=1)
    factors = lowest_bit.double().log2().long()
    return bool(((shift - 1 - factors < 31) & (multiplier != 0)).any())


@cache
def _exact_products() -> bool:
    """Whether this machine's 8-bit product is exact: some sum pairs in 16 bits, which saturate."""
    left = torch.tensor([[127], [-128], [127]], dtype=torch.int8).expand(3, 64).contiguous()
    right = torch.tensor([[127, -128, 127]], dtype=torch.int8).expand(64, 3).contiguous()
    return torch.equal(torch._int_mm(left, right).long(), left.long() @ right.long())


def integer_matmul(
    left: Int8[Tensor, "rows inner"], right: Int8[Tensor, "inner columns"]
) -> Int32[Tensor, "rows columns"]:
    """The product of 8-bit matrices, summed in 32 bits.

    >>> integer_matmul(torch.full((1, 2), 100, dtype=torch.int8), torch.full((2, 1), 100, dtype=torch.int8)).item()
    20000
    """
    if left.is_cuda and (len(left) <= 16 or left.shape[1] % 8 or right.shape[1] % 8):
        # The kernel of CUDA wants more than 16 rows and multiples of 8.
        rows, inner, columns = len(left), left.shape[1], right.shape[1]
        left = torch.nn.functional.pad(left, (0, -inner % 8, 0, max(17 - rows, 0)))
        right = torch.nn.functional.pad(right, (0, -columns % 8, 0, -inner % 8))
        return torch._int_mm(left, right)[:rows, :columns]
    if left.is_cuda or _exact_products():
        return torch._int_mm(left, right)
    return left.int() @ right.int()


def integer_sqrt(x: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    r""":math:`\lfloor \sqrt x \rfloor` by Newton's method on integers (I-BERT, algorithm 4).

    >>> integer_sqrt(torch.tensor([0, 1, 24, 25, 2**52 - 1])).tolist()
    [0, 1, 4, 5, 67108863]
    """
    # From a power of two above the root, the iterates fall until they reach it.
    bits = torch.zeros_like(x)
    left = x.clone()
    for step in (32, 16, 8, 4, 2, 1):
        more = left >= (1 << step)
        bits += step * more
        left = torch.where(more, left >> step, left)
    root = torch.ones_like(x) << (bits // 2 + 1)
    positive = x.clamp(min=1)
    while True:
        lower = root + positive // root >> 1
        if not bool((lower < root).any()):
            return torch.where(x > 0, root, torch.zeros_like(root))
        root = torch.minimum(root, lower)


def integer_exp(x: Int64[Tensor, "*shape"], scale: float) -> tuple[Int64[Tensor, "*shape"], float]:
    r"""exp of values up to 0: :math:`x = -z \ln 2 + p`, a polynomial for exp(p), and z shifts (I-BERT, algorithm 2).

    Args:
        x: on a grid of ``scale``, none above 0.
        scale: 2^-8 or less.

    Returns:
        The result and its scale.

    >>> found, scale = integer_exp(torch.tensor([0, -1024, -4096]), 2.0**-12)
    >>> [round(value * scale, 3) for value in found.tolist()]
    [1.0, 0.78, 0.368]
    """
    period = round(math.log(2) / scale)
    halvings = (-x) // period
    rest = x + halvings * period
    shift, offset = round(EXP_SHIFT / scale), round(EXP_OFFSET / (EXP_SCALE * scale * scale))
    return (rest + shift).square_().add_(offset) >> halvings.clamp_(max=LARGEST_SHIFT), EXP_SCALE * scale * scale


def integer_softmax(
    x: Integer[Tensor, "*shape"], scale: float, dim: int = -1, bits: int = 15
) -> tuple[Int64[Tensor, "*shape"], float]:
    r"""Softmax as shares of :math:`2^{bits}` (I-BERT, section 3.5).

    >>> shares, scale = integer_softmax(torch.tensor([[0, 0, -4096]]), 2.0**-12)
    >>> [round(value * scale, 2) for value in shares[0].tolist()]
    [0.42, 0.42, 0.16]
    """
    powers, _ = integer_exp(x.long() - x.long().amax(dim, keepdim=True), scale)
    # The sum of many terms, shifted by `bits`, must stay inside 64 bits.
    total = powers.sum(dim, keepdim=True).clamp(min=1)
    return ((powers << bits) + (total >> 1)) // total, 2.0**-bits


def integer_gelu(x: Integer[Tensor, "*shape"], scale: float, bits: int = 12) -> tuple[Int64[Tensor, "*shape"], float]:
    r"""GELU as :math:`x\,(1 + \text{erf}(x / \sqrt 2)) / 2` with a polynomial for erf (I-BERT, algorithm 1).

    The polynomial's coefficients were fitted to GELU: erf itself is off by up to .096, GELU by .018.

    Args:
        x: on a grid of ``scale``.
        scale: 2^-8 or less.
        bits: of the factor that x is multiplied by.

    >>> found, scale = integer_gelu(torch.tensor([-1024, 0, 1024]), 2.0**-10)
    >>> [round(value * scale, 3) for value in found.tolist()]
    [-0.163, 0.0, 0.837]
    """
    wide = x.long()
    inner = scale / math.sqrt(2)
    reach = round(-ERF_SHIFT / inner)
    unit = round(1 / (-ERF_SCALE * inner * inner))
    # With a < 0 the scale is -a S^2, and erf = sgn(x) (1 - (min(|x|, -b) + b)^2).
    clipped = wide.abs().clamp_(max=reach).sub_(reach)
    error = wide.sign() * (unit - clipped.square_())
    return wide * (((error + unit << bits) + unit) // (2 * unit)), scale * 2.0**-bits


def integer_sigmoid(
    x: Integer[Tensor, "*shape"], scale: float, bits: int = 15
) -> tuple[Int64[Tensor, "*shape"], float]:
    r"""The logistic function, from the integer exp of :math:`-|x|`.

    >>> found, scale = integer_sigmoid(torch.tensor([-4096, 0, 4096]), 2.0**-12)
    >>> [round(value * scale, 2) for value in found.tolist()]
    [0.27, 0.5, 0.73]
    """
    power, step = integer_exp(-x.long().abs(), scale)
    unit = round(1 / step)
    small = (power << bits) // (power + unit)
    return torch.where(x > 0, (1 << bits) - small, small), 2.0**-bits


def integer_tanh(x: Integer[Tensor, "*shape"], scale: float, bits: int = 15) -> tuple[Int64[Tensor, "*shape"], float]:
    r""":math:`\tanh x = \text{sgn}(x) (1 - e) / (1 + e)` with :math:`e = \exp(-2|x|)`.

    >>> found, scale = integer_tanh(torch.tensor([-4096, 0, 4096]), 2.0**-12)
    >>> [round(value * scale, 2) for value in found.tolist()]
    [-0.76, 0.0, 0.76]
    """
    power, step = integer_exp(-2 * x.long().abs(), scale)
    unit = round(1 / step)
    return x.sign() * (((unit - power).clamp(min=0) << bits) // (unit + power)), 2.0**-bits


def integer_layer_norm(
    x: Integer[Tensor, "*batch features"], epsilon: Int64[Tensor, ""], bits: int = 12
) -> tuple[Int64[Tensor, "*batch features"], float]:
    r"""Each row less its mean, over its standard deviation, which an integer square root gives (I-BERT, section 3.6).

    Args:
        x: values below 2^20 in magnitude, on any one grid: the result does not hang on it.
        epsilon: what is added to the variance, in units of the grid's square times :math:`4^{bits - 4}`.
        bits: of the fraction in the result.

    >>> found, scale = integer_layer_norm(torch.tensor([[100, 200, 300]]), torch.tensor(0))
    >>> [round(value * scale, 3) for value in found[0].tolist()]
    [-1.225, 0.0, 1.225]
    """
    wide = x.long()
    count = x.shape[-1]
    # The mean and the variance keep a fraction, so that narrow rows do not suffer.
    guard = bits - 4
    centred = (wide << guard) - ((wide.sum(-1, keepdim=True) << guard) + count // 2) // count
    variance = centred.square().sum(-1, keepdim=True) // count + epsilon
    deviation = integer_sqrt(variance).clamp(min=1)
    sign = centred.sign()
    return sign * (((centred.abs() << bits) + (deviation >> 1)) // deviation), 2.0**-bits
