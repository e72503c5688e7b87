"""Weight sharing trained as such: which entry a weight has stays, what the entries are is learned."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from etude.compress.quantize.levels import midpoints
from etude.compress.quantize.quantizers import CodebookQuantizer, LevelQuantizer
from etude.compress.quantize.schemes import Codebook, LloydMax
from etude.core.checks import InputError

__all__ = ["Shared", "SharedQuantizer"]


@dataclass(frozen=True)
class Shared:
    """Levels or vectors that many weights share, fine-tuned by the sum of those weights' gradients.

    Each weight is assigned to an entry once; then the entries are parameters of the model.

    Args:
        scheme: `LloydMax` (Deep Compression: Han et al., 2016) or `Codebook` (product and residual quantisation).

    >>> quantizer = Shared(LloydMax(1)).fit(torch.tensor([0.0, 1.0, 10.0, 11.0]))
    >>> quantizer(torch.zeros(4)).sum().backward()
    >>> quantizer.entries.tolist(), quantizer.entries.grad.tolist()
    ([[0.5, 10.5]], [[2.0, 2.0]])
    """

    scheme: LloydMax | Codebook

    def fit(
        self,
        values: Tensor,
        *,
        importance: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> "SharedQuantizer":
        """The quantizer whose entries start from ``values``, which it then is bound to."""
        if not isinstance(values, Tensor):
            raise InputError("shared entries are for weights", where="activations", instead="use LloydMax")
        fitted = self.scheme.fit(values, importance=importance, generator=generator)
        return SharedQuantizer(fitted, fitted.codes(values))


class SharedQuantizer(nn.Module):
    """Gives the entries that its codes name, whatever it is called on; made by `Shared`.

    Args:
        quantizer: what the codes mean.
        codes: of every weight.
    """

    held: Tensor

    def __init__(self, quantizer: LevelQuantizer | CodebookQuantizer, codes: Integer[Tensor, "..."]):
        super().__init__()
        self.quantizer = quantizer
        self._name = "coefficients" if isinstance(quantizer, LevelQuantizer) else "codebooks"
        entries = quantizer._buffers.pop(self._name)
        assert entries is not None
        quantizer.register_parameter(self._name, nn.Parameter(entries))
        self.register_buffer("held", codes)

    @property
    def entries(self) -> Tensor:
        """The shared values."""
        return getattr(self.quantizer, self._name)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weights' entries, in the shape of ``x``."""
        return self.quantizer.values(self.held).reshape(x.shape).to(x.dtype)

    def codes(self, x: Float[Tensor, "*shape"]) -> Integer[Tensor, "..."]:
        """The codes held."""
        return self.held

    def values(self, codes: Integer[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The entries that codes name."""
        return self.quantizer.values(codes)

    def code_bits(self) -> int:
        """Bits of one code."""
        return self.quantizer.code_bits()

    def codes_for(self, count: int) -> int:
        """How many codes stand for ``count`` values."""
        return self.quantizer.codes_for(count)

    def overhead_bits(self) -> int:
        """Bits of the entries."""
        return self.quantizer.overhead_bits()

    def plain(self) -> LevelQuantizer | CodebookQuantizer:
        """The entries learned, for weights that already are at them."""
        if isinstance(self.quantizer, CodebookQuantizer):
            return CodebookQuantizer(self.entries.detach().clone(), self.quantizer.shape)
        levels = self.quantizer.levels.detach().sort(dim=1).values
        quantizer = self.quantizer
        return LevelQuantizer(levels, midpoints(levels), granularity=quantizer.granularity, bits=quantizer.bits)
