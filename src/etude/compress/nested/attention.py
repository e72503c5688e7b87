"""Multi-head attention whose heads together need not be as wide as the stream they read and write."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.core.checks import UnsupportedModuleError

__all__ = ["PartialAttention"]


class PartialAttention(nn.MultiheadAttention):
    r"""`torch.nn.MultiheadAttention` after some heads, or part of the stream's width, were cut off.

    torch's own forward takes the size of a head to be the stream's width divided by the number of heads. Here it is
    the attribute ``head_dim``, so that the scale :math:`1/\sqrt{d}` of the scores stays as trained. Arguments and
    results are torch's.
    """

    @staticmethod
    def check(path: str, module: nn.MultiheadAttention) -> None:
        """Refuse what cannot be cut."""
        if module.bias_k is not None or module.add_zero_attn:
            raise UnsupportedModuleError(
                path,
                module,
                "it appends a bias or zeros to keys and values, which carry units of no layer",
                instead="build it with add_bias_kv=False, add_zero_attn=False",
            )

    def forward(  # noqa: D102 - torch's
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        arrived = [query, key, value] if batched else [each.unsqueeze(0) for each in (query, key, value)]
        if batched and not self.batch_first:
            arrived = [each.transpose(0, 1) for each in arrived]
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        heads = [
            F.linear(each, weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for each, (weight, bias) in zip(arrived, self._projections(), strict=True)
        ]
        mask = self._mask(key_padding_mask, attn_mask, heads[0])
        mixed, weights = self._attend(heads[0], heads[1], heads[2], mask, need_weights)
        result = F.linear(mixed.transpose(1, 2).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return (result if self.batch_first else result.transpose(0, 1)), weights

    def _projections(self) -> Any:
        """Weight and bias of queries, keys and values."""
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is None
            else self.in_proj_weight.chunk(3)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return zip(weights, biases, strict=True)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout), None
        scores = query @ key.transpose(-1, -2) / self.head_dim**0.5
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        return weights @ value, weights

    def _mask(self, padding: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores."""
        found = None
        if mask is not None:
            # (L, S), or (batch x heads, L, S) with those of all heads, of which the first stay.
            found = mask if mask.dim() == 2 else mask.unflatten(0, (len(query), -1))[:, : query.shape[1]]
            found = _additive(found, query)
        if padding is not None:
            added = _additive(padding, query)[:, None, None]
            found = added if found is None else found + added
        return found


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Zero where a boolean mask lets pass, minus infinity where it does not; other masks as they are."""
    if mask.dtype is not torch.bool:
        return mask.to(like)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
