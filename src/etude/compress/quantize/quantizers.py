"""Quantizers: from values to codes and back, with their state in buffers."""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from etude.compress.quantize.granularity import Granularity, PerTensor
from etude.compress.quantize.rounding import rounded
from etude.core.codes import straight_through

__all__ = ["CodebookQuantizer", "DynamicQuantizer", "LevelQuantizer", "Quantizer", "UniformQuantizer"]


@runtime_checkable
class Quantizer(Protocol):
    """What every fitted scheme can do; called on values, it simulates quantisation (a module with gradients)."""

    def codes(self, x: Tensor) -> Tensor:
        """Integers that stand for the values of ``x``."""
        ...

    def values(self, codes: Tensor) -> Tensor:
        """The values that codes stand for."""
        ...

    def code_bits(self) -> int:
        """Bits of one code."""
        ...

    def codes_for(self, count: int) -> int:
        """How many codes stand for ``count`` values."""
        ...

    def overhead_bits(self) -> int:
        """Bits of what is stored besides codes: scales, zero points, levels, codebooks."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """The values after quantisation."""
        ...


def _bits(*tensors: Tensor | None) -> int:
    return sum(8 * each.numel() * each.element_size() for each in tensors if each is not None)


class _PassInside(torch.autograd.Function):
    """Quantised values forward; backward the gradient passes where the value was not clipped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, quantised: Tensor, inside: Tensor) -> Tensor:
        return quantised.view_as(quantised)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None


class UniformQuantizer(nn.Module):
    r"""Equally spaced levels: :math:`q = \text{clamp}(\text{round}(r / S) + z)`, :math:`\tilde r = S (q - z)`.

    The zero point's sign is that of torch and ONNX; the survey's Z (eq. 2) is -z. Zero is represented exactly.

    Args:
        scale: S of each group.
        zero_point: z of each group, integers within the codes; None for symmetric levels, where it is 0.
        lowest: smallest code.
        highest: largest code.
        granularity: which values share a scale.
        rounding: as of `rounded`.
        generator: of stochastic rounding.

    >>> quantizer = UniformQuantizer(torch.tensor([0.5]), None, -8, 7)
    >>> quantizer.codes(torch.tensor([0.6, -9.0])).tolist(), quantizer(torch.tensor([0.6, -9.0])).tolist()
    ([1, -8], [0.5, -4.0])
    """

    scale: Tensor
    zero_point: Tensor | None

    encoding = ()
    """Buffers that codes are found by, and that values can be restored without."""

    def __init__(
        self,
        scale: Float[Tensor, "groups"],
        zero_point: Integer[Tensor, "groups"] | None,
        lowest: int,
        highest: int,
        *,
        granularity: Granularity | None = None,
        rounding: str = "nearest",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.lowest, self.highest, self.rounding, self.generator = lowest, highest, rounding, generator
        self.granularity: Granularity = PerTensor() if granularity is None else granularity
        self.register_buffer("scale", scale.detach().clone())
        # Stored in as few bits as the codes, so that small groups stay cheap.
        self.register_buffer("zero_point", None if zero_point is None else zero_point.to(self.code_type))

    @property
    def code_type(self) -> torch.dtype:
        """The smallest integer dtype that holds every code."""
        for dtype in (torch.int8, torch.uint8, torch.int16):
            bounds = torch.iinfo(dtype)
            if bounds.min <= self.lowest and self.highest <= bounds.max:
                return dtype
        return torch.int32

    def extra_repr(self) -> str:
        """The codes' range and what shares a scale."""
        return f"codes {self.lowest}..{self.highest}, {self.granularity}, rounding={self.rounding!r}"

    def _levels(self, table: Tensor) -> Tensor:
        """Codes before they are clamped, as floats."""
        found = rounded(table * (1 / self.scale).unsqueeze(1), self.rounding, self.generator)
        return found if self.zero_point is None else found + self.zero_point.to(found.dtype).unsqueeze(1)

    def _spread(self, levels: Tensor) -> Tensor:
        shifted = levels if self.zero_point is None else levels - self.zero_point.to(levels.dtype).unsqueeze(1)
        return shifted * self.scale.unsqueeze(1)

    def codes(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """Integers from ``lowest`` to ``highest``."""
        levels = self._levels(self.granularity.table(x)).clamp(self.lowest, self.highest)
        return self.granularity.restore(levels.to(self.code_type), x.shape)

    def values(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Codes times their scale."""
        table = self.granularity.table(codes.to(self.scale.dtype))
        return self.granularity.restore(self._spread(table), codes.shape)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Simulated quantisation; the gradient passes to values inside the clipping range (straight through)."""
        with torch.no_grad():
            levels = self._levels(self.granularity.table(x))
            clamped = levels.clamp(self.lowest, self.highest)
            quantised = self.granularity.restore(self._spread(clamped), x.shape).to(x.dtype)
            if not x.requires_grad:
                return quantised
            inside = self.granularity.restore(clamped == levels, x.shape)
        return _PassInside.apply(x, quantised, inside)

    def code_bits(self) -> int:
        """Bits of one code."""
        return max(math.ceil(math.log2(self.highest - self.lowest + 1)), 1)

    def codes_for(self, count: int) -> int:
        """One code a value."""
        return count

    def overhead_bits(self) -> int:
        """Bits of scales and zero points."""
        return _bits(self.scale, self.zero_point)


class LevelQuantizer(nn.Module):
    r"""Any levels (survey, eq. 6): :math:`Q(r) = X_i` where :math:`\Delta_i \le r < \Delta_{i+1}`.

    Args:
        levels: X of each group; or, with ``design``, the few numbers that give them.
        thresholds: the Delta between them, ascending.
        granularity: which values share levels.
        bits: of one code.
        design: (numbers, levels) matrix of a rule by which a group's levels are ``levels @ design``, so that only the
            numbers, e.g. a scale, need be stored.
        order: (groups, regions) code of the level between each two thresholds; by default they are numbered upwards.
        stored: how many numbers a group's levels hang on, where that is not the width of ``levels``.
        clip: (groups,) magnitude up to which the gradient passes; to all values where None.

    >>> ternary = LevelQuantizer(torch.tensor([[-2.0, 0.0, 2.0]]), torch.tensor([[-1.0, 1.0]]), bits=2)
    >>> ternary(torch.tensor([0.4, 5.0])).tolist(), ternary.codes(torch.tensor([0.4, 5.0])).tolist()
    ([0.0, 2.0], [1, 2])
    """

    coefficients: Tensor
    design: Tensor | None
    thresholds: Tensor
    order: Tensor | None
    clip: Tensor | None

    encoding = ("thresholds", "order", "clip")
    """Buffers that codes are found by, and that values can be restored without."""

    def __init__(
        self,
        levels: Float[Tensor, "groups numbers"],
        thresholds: Float[Tensor, "groups gaps"],
        *,
        granularity: Granularity | None = None,
        bits: int,
        design: Float[Tensor, "numbers levels"] | None = None,
        order: Integer[Tensor, "groups regions"] | None = None,
        stored: int | None = None,
        clip: Float[Tensor, "groups"] | None = None,
    ):
        super().__init__()
        self.granularity: Granularity = PerTensor() if granularity is None else granularity
        self.bits, self.stored = bits, levels.shape[1] if stored is None else stored
        self.register_buffer("coefficients", levels.contiguous().clone())
        self.register_buffer("design", design, persistent=False)
        self.register_buffer("thresholds", thresholds.contiguous().clone())
        self.register_buffer("order", order)
        self.register_buffer("clip", clip)

    def extra_repr(self) -> str:
        """The number of levels and what shares them."""
        return f"{self.levels.shape[1]} levels, {self.bits} bits, {self.granularity}"

    @property
    def levels(self) -> Float[Tensor, "groups levels"]:
        """The value of every code, for each group."""
        return self.coefficients if self.design is None else self.coefficients @ self.design

    def _indices(self, table: Tensor) -> Tensor:
        if len(self.thresholds) == 1:
            regions = torch.bucketize(table, self.thresholds[0], right=True)
            return regions if self.order is None else self.order[0][regions]
        regions = torch.searchsorted(self.thresholds, table.contiguous(), right=True)
        return regions if self.order is None else self.order.gather(1, regions)

    def _look_up(self, indices: Tensor) -> Tensor:
        levels = self.levels
        return levels[0][indices] if len(levels) == 1 else levels.gather(1, indices)

    def codes(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """The index of each value's level."""
        indices = self._indices(self.granularity.table(x).to(self.thresholds.dtype))
        return self.granularity.restore(indices.to(torch.uint8 if self.bits <= 8 else torch.int32), x.shape)

    def values(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The levels that codes name."""
        return self.granularity.restore(self._look_up(self.granularity.table(codes.long())), codes.shape)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Simulated quantisation, with a straight-through gradient."""
        with torch.no_grad():
            table = self.granularity.table(x).to(self.thresholds.dtype)
            quantised = self.granularity.restore(self._look_up(self._indices(table)), x.shape).to(x.dtype)
        if not x.requires_grad:
            return quantised
        if self.clip is None:
            return straight_through(x, quantised)
        inside = self.granularity.restore(table.detach().abs() <= self.clip.unsqueeze(1), x.shape)
        return _PassInside.apply(x, quantised, inside)

    def code_bits(self) -> int:
        """Bits of one code."""
        return self.bits

    def codes_for(self, count: int) -> int:
        """One code a value."""
        return count

    def overhead_bits(self) -> int:
        """Bits of the stored levels, or of the numbers that give them."""
        return len(self.coefficients) * self.stored * 8 * self.coefficients.element_size()


class CodebookQuantizer(nn.Module):
    """Runs of values, each replaced by the sum of one vector from every stage's codebook.

    Args:
        codebooks: one set for all columns (``books`` = 1), or one for each column of runs.
        shape: of the values it was fitted to.
        metric: (columns, dim, dim) or (1, dim, dim) matrices G of the distance (v - c)' G (v - c) by which
            vectors are assigned; None for the Euclidean one.

    >>> books = torch.tensor([[[[0.0, 0.0], [1.0, 1.0]]]])
    >>> quantizer = CodebookQuantizer(books, (1, 4))
    >>> quantizer(torch.tensor([[0.9, 1.2, 0.1, 0.0]])).tolist()
    [[1.0, 1.0, 0.0, 0.0]]
    """

    codebooks: Tensor
    metric: Tensor | None

    encoding = ("metric",)
    """Buffers that codes are found by, and that values can be restored without."""

    def __init__(
        self,
        codebooks: Float[Tensor, "stages books entries dim"],
        shape: tuple[int, ...],
        *,
        metric: Float[Tensor, "columns dim dim"] | None = None,
    ):
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("codebooks", codebooks.contiguous())
        # How to assign is needed to quantise, not to restore: it is no part of what is stored.
        self.register_buffer("metric", metric, persistent=False)

    def extra_repr(self) -> str:
        """Stages, codebooks, entries and dimensions."""
        stages, books, entries, dim = self.codebooks.shape
        return f"{stages} stages of {books} codebooks, {entries} entries of {dim} values"

    def runs(self, x: Tensor) -> Float[Tensor, "rows columns dim"]:
        """The values cut into vectors."""
        return x.reshape(self.shape[0], -1, self.codebooks.shape[-1])

    def codes(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "stages rows columns"]:
        """For each stage and vector the index of its entry."""
        from etude.compress.quantize.vectors import assign

        left, found = self.runs(x).to(self.codebooks.dtype), []
        for books in self.codebooks:
            indices = assign(left, books, self.metric)
            left = left - _entries(books, indices)
            found.append(indices)
        entries = self.codebooks.shape[2]
        return torch.stack(found).to(torch.uint8 if entries <= 256 else torch.int32)

    def values(self, codes: Integer[Tensor, "stages rows columns"]) -> Float[Tensor, "..."]:
        """The sums of the entries that codes name; differentiable with respect to the codebooks."""
        parts = [_entries(books, indices.long()) for books, indices in zip(self.codebooks, codes, strict=True)]
        return torch.stack(parts).sum(0).reshape(self.shape)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Simulated quantisation, with a straight-through gradient."""
        with torch.no_grad():
            quantised = self.values(self.codes(x)).to(x.dtype)
        return straight_through(x, quantised) if x.requires_grad else quantised

    def code_bits(self) -> int:
        """Bits of one code."""
        return max(math.ceil(math.log2(self.codebooks.shape[2])), 1)

    def codes_for(self, count: int) -> int:
        """One code for each stage and vector."""
        return self.codebooks.shape[0] * (count // self.codebooks.shape[-1])

    def overhead_bits(self) -> int:
        """Bits of the codebooks."""
        return _bits(self.codebooks)


def _entries(books: Float[Tensor, "books entries dim"], indices: Integer[Tensor, "rows columns"]) -> Tensor:
    if len(books) == 1:
        return books[0][indices]
    return books[torch.arange(len(books), device=books.device), indices]


class DynamicQuantizer(nn.Module):
    """Fits its scheme anew to every input: ranges found at run time.

    Args:
        scheme: what to fit; one with a closed form (`MinMax` ranges) keeps this cheap.

    >>> from etude.compress.quantize import PerToken, Uniform
    >>> quantizer = DynamicQuantizer(Uniform(8, granularity=PerToken()))
    >>> quantizer(torch.tensor([[1.0, 0.5], [127.0, 0.6]])).tolist()
    [[1.0, 0.5039370059967041], [127.0, 1.0]]
    """

    def __init__(self, scheme: Any):
        super().__init__()
        self.scheme = scheme

    def extra_repr(self) -> str:
        """The scheme."""
        return str(self.scheme)

    def at(self, x: Tensor) -> Quantizer:
        """The quantizer for this very input."""
        return self.scheme.fit(x.detach())

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Simulated quantisation in the input's own range."""
        return self.at(x)(x)
