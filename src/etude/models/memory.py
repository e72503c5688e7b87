r"""The end-to-end memory network of Sukhbaatar, Szlam, Weston and Fergus (2015)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from etude.core.checks import InputError, check_at_least, check_fraction, check_one_of

__all__ = ["MemoryNetwork"]

ATTENTIONS = ("softmax", "linear")
ENCODINGS = ("position", "bag")
TYINGS = ("adjacent", "layer")


class MemoryNetwork(nn.Module):
    r"""Answers a question by reading the statements of a story several times over.

    Each of the K hops compares its query with a key of every statement, and adds the values it attends to:
    :math:`p_i = \mathrm{softmax}(u^{k\top} m_i^k)`, :math:`u^{k+1} = u^k + \sum_i p_i c_i^k` (eq. 1-4). Keys and values
    are sums of the statement's word embeddings, weighted by the word's position, plus an embedding of how long ago the
    statement was made (section 4.1). The answer is read off by :math:`W (u^{K+1})`.

    Word 0 is the blank: it embeds as zero and has no parameters. Shorter stories are padded in front by statements of
    blanks, which are empty memories. Words are counted before they are embedded, which is fast for the small
    vocabularies of such tasks and wasteful for large ones.

    Args:
        vocabulary: number of words, the blank among them.
        statements: most statements a story has.
        generator: CPU generator of the initial weights, N(0, 0.1²) as in the paper.
        hops: K; 3 in the paper.
        width: size of the embeddings; 20 in the paper.
        tying: ``adjacent``: one hop's values are the next one's keys, the first keys embed the question, the last
            values read off the answer; or ``layer``: all hops share keys and values, and a matrix H maps the query
            between them.
        encoding: ``position`` weighs words by their place in the sentence; ``bag`` does not.
        attention: ``softmax``, or ``linear`` to leave the softmax out (the paper's linear start trains so first, then
            sets the attribute `attention` to ``softmax``).
        time_noise: in training, blanks inserted at random places of a story, up to this share of its length; 0.1 in the
            paper.
        dropout: share of the query's entries dropped after each hop in training; none in the paper.

    Shape:
        - Input: ``(batch, sentences, words)`` word indices, the last sentence the question.
        - Output: ``(batch, vocabulary)`` scores of the answer.

    Sukhbaatar et al., End-To-End Memory Networks, NeurIPS 2015.

    >>> network = MemoryNetwork(20, 8, torch.Generator().manual_seed(0))
    >>> network(torch.ones(5, 9, 3, dtype=torch.int64)).shape
    torch.Size([5, 20])
    """

    def __init__(
        self,
        vocabulary: int,
        statements: int,
        generator: torch.Generator,
        *,
        hops: int = 3,
        width: int = 20,
        tying: str = "adjacent",
        encoding: str = "position",
        attention: str = "softmax",
        time_noise: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, value, least in (("vocabulary", vocabulary, 2), ("statements", statements, 1)):
            check_at_least(name, value, least)
        check_at_least("hops", hops, 1)
        check_at_least("width", width, 1)
        check_fraction("time_noise", time_noise, zero=True)
        self.hops, self.statements = hops, statements
        self.tying = check_one_of("tying", tying, TYINGS)
        self.encoding = check_one_of("encoding", encoding, ENCODINGS)
        self.attention = check_one_of("attention", attention, ATTENTIONS)
        self.blanks = math.ceil(time_noise * statements)
        self.dropout = nn.Dropout(check_fraction("dropout", dropout, zero=True))
        tables = hops + 1 if tying == "adjacent" else 4  # by layer: keys, values, questions, answers

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.1 * torch.randn(shape, generator=generator))

        self.words = nn.ParameterList(drawn(vocabulary - 1, width) for _ in range(tables))
        self.ages = nn.ParameterList(
            drawn(statements + self.blanks, width) for _ in range(tables if tying == "adjacent" else 2)
        )
        if tying == "layer":
            self.between = drawn(width, width)

    def forward(self, x: Int64[Tensor, "batch sentences words"]) -> Float[Tensor, "batch vocabulary"]:
        """Scores of the answer, one for each word."""
        if x.dim() != 3 or not 2 <= x.shape[1] <= self.statements + 1:
            raise InputError(
                f"got shape {tuple(x.shape)}",
                where="input",
                instead=f"give (batch, sentences, words) with 1 to {self.statements} statements and a question",
            )
        told, question = x[:, :-1], x[:, -1]
        adjacent = self.tying == "adjacent"
        tables = [F.pad(table, (0, 0, 1, 0)) for table in self.words]  # the blank embeds as zero
        held = self._memories(told, tables[: len(self.ages)])
        query = self._features(question) @ self._weights(tables[0 if adjacent else 2])
        for hop in range(self.hops):
            keys, values = (held[hop], held[hop + 1]) if adjacent else held
            scores = (keys * query.unsqueeze(1)).sum(-1)
            weights = scores.softmax(-1) if self.attention == "softmax" else scores
            carried = query if adjacent else query @ self.between.T
            query = self.dropout(carried + (weights.unsqueeze(-1) * values).sum(1))
        return query @ tables[-1].T

    def _memories(
        self, told: Int64[Tensor, "batch statements words"], tables: Sequence[Float[Tensor, "vocabulary width"]]
    ) -> Sequence[Float[Tensor, "batch statements width"]]:
        """Every statement embedded by every table."""
        ages = F.one_hot(self._ages(told), len(self.ages[0])) * (told != 0).any(-1, keepdim=True)
        features = torch.cat([self._features(told), ages], -1)
        weights = [torch.cat([self._weights(table), age]) for table, age in zip(tables, self.ages, strict=True)]
        return [features @ weight for weight in weights]

    def _features(self, sentences: Int64[Tensor, "*some words"]) -> Float[Tensor, "*some features"]:
        """How often each word occurs and, to encode positions, how far from the sentence's middle in all."""
        words = F.one_hot(sentences, len(self.words[0]) + 1).to(self.words[0])
        if self.encoding == "bag":
            return words.sum(-2)
        return torch.cat([words.sum(-2), (words * _centred(words.shape[-2], words).unsqueeze(-1)).sum(-2)], -1)

    def _weights(self, table: Float[Tensor, "vocabulary width"]) -> Float[Tensor, "features width"]:
        """What `_features` are multiplied by: a word at place j counts as ``1 + 4 j k`` in entry k, both centred.

        So do the authors' published weights; the paper's ``(1 - j/J) - (k/d) (1 - 2j/J)`` is half of them, but for
        rounding at the ends.
        """
        return table if self.encoding == "bag" else torch.cat([table, table * (4 * _centred(table.shape[1], table))])

    def _ages(self, told: Int64[Tensor, "batch statements words"]) -> Int64[Tensor, "batch statements"]:
        """How long ago each statement was made; in training, as if blanks had been said in between."""
        rows, count = told.shape[:2]
        if not (self.training and self.blanks):
            return torch.arange(count - 1, -1, -1, device=told.device).expand(rows, count)
        places = count + self.blanks
        inserted = torch.randint(self.blanks + 1, (rows, 1), device=told.device)
        order = torch.rand(rows, places, device=told.device)
        order = order.masked_fill(torch.arange(places, device=told.device) >= count + inserted, 2.0)
        return order.argsort(-1)[:, :count].sort(-1, descending=True).values


def _centred(count: int, like: Tensor) -> Float[Tensor, "count"]:
    """Places along an axis, from -1/2 to 1/2."""
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count - 0.5
