"""Transport plans between two networks' units, looked up by unit id and applied to the axes of their weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from etude.core.checks import InputError
from etude.merge.alignment import Solver, incoming, outgoing

__all__ = ["Maps", "Piece", "carried", "residual_map", "within_heads"]

Ids = tuple[Tensor, Tensor]
"""Unit ids in the source network and in the anchor, at corresponding places."""


@dataclass(frozen=True, eq=False)
class Piece:
    """How some of the entries along an axis correspond.

    Attributes:
        plan: source units by anchor units; None where they are the same.
        rows: (source units, copies) where the source's units lie along its axis.
        columns: (anchor units, copies) likewise.
    """

    plan: Tensor | None
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True, eq=False)
class _Block:
    """Units that one plan maps; ``depth`` is the number of layers behind them, ``table`` whether they are constants."""

    plan: Tensor | None
    depth: int
    table: bool


class Maps:
    """The plans found so far, by unit.

    Args:
        sizes: how many unit ids the source and the anchor have.
    """

    def __init__(self, sizes: tuple[int, int]):
        self._blocks: list[_Block] = []
        self._block = [torch.full((size,), -1) for size in sizes]
        self._place = [torch.full((size,), -1) for size in sizes]

    def define(self, ids: Ids, plan: Tensor | None, *, depth: int = 0, table: bool = False) -> None:
        """Map ``ids`` by a plan; by None onto one another in order."""
        for side in (0, 1):
            self._block[side][ids[side]] = len(self._blocks)
            self._place[side][ids[side]] = torch.arange(len(ids[side]))
        self._blocks.append(_Block(plan, depth, table))

    def alias(self, ids: Ids, known: Ids) -> None:
        """Map ``ids`` as the units ``known`` are mapped: they are held by the same weight."""
        for side in (0, 1):
            self._block[side][ids[side]] = self._block[side][known[side]]
            self._place[side][ids[side]] = self._place[side][known[side]]

    def knows(self, ids: Ids) -> bool:
        """Whether all of them are mapped."""
        return all(bool((self._block[side][ids[side][ids[side] >= 0]] >= 0).all()) for side in (0, 1))

    def depth(self, ids: Ids) -> int:
        """The largest number of layers behind the units."""
        return max((self._blocks[block].depth for block in self._found(ids)), default=0)

    def is_table(self, ids: Ids) -> bool:
        """Whether the units come from parameters alone."""
        return all(self._blocks[block].table for block in self._found(ids))

    def _found(self, ids: Ids) -> list[int]:
        return sorted({block for block in self._block[1][ids[1][ids[1] >= 0]].tolist() if block >= 0})

    def pieces(self, ids: Ids, where: str) -> list[Piece]:
        """How the entries of two axes correspond, given the unit at each; -1 marks entries without a unit.

        Raises:
            InputError: if entries of one axis have no counterparts on the other; it names ``where``.
        """
        if not self.knows(ids):
            raise InputError(
                "it uses units before they can be mapped", where=where, instead="such models cannot be fused"
            )
        raw = [(each < 0).nonzero() for each in ids]
        if len(raw[0]) != len(raw[1]):
            raise _unequal(where, len(raw[0]), len(raw[1]))
        found = [Piece(None, raw[0], raw[1])] if len(raw[0]) else []
        held = [torch.where(ids[side] >= 0, self._block[side][ids[side].clamp(min=0)], -1) for side in (0, 1)]
        for number in sorted(set(held[0].tolist()) | set(held[1].tolist())):
            if number >= 0:
                found.append(self._piece(number, ids, held, where))
        return found

    def _piece(self, number: int, ids: Ids, held: Sequence[Tensor], where: str) -> Piece:
        units, places = [], []
        for side in (0, 1):
            at = (held[side] == number).nonzero().flatten()
            unit, order = self._place[side][ids[side][at]].sort(stable=True)
            unit, copies = unit.unique_consecutive(return_counts=True)
            if not len(unit) or bool((copies != copies[0]).any()):
                raise InputError("its units are read unevenly", where=where, instead="give models of one architecture")
            units.append(unit)
            places.append(at[order].view(len(unit), -1))
        plan = self._blocks[number].plan
        if places[0].shape[1] != places[1].shape[1] or (plan is None and not torch.equal(*units)):
            raise _unequal(where, places[0].numel(), places[1].numel())
        if plan is not None and (len(units[0]), len(units[1])) != tuple(plan.shape):
            plan = plan[units[0]][:, units[1]]
        return Piece(plan, places[0], places[1])

    def plan(self, ids: Ids, where: str, like: Tensor) -> Tensor:
        """The plan between the units at two axes as one matrix of total mass 1; zero where there are none."""
        sizes = len(ids[0]), len(ids[1])
        whole = like.new_zeros(sizes)
        for piece in self.pieces(ids, where):
            if bool((ids[0][piece.rows] < 0).any()):
                continue  # padded zeros
            if piece.rows.shape[1] > 1:
                raise InputError("a unit comes several times", where=where, instead="this sum cannot be fused")
            share = len(piece.rows) / sizes[0]
            block = torch.eye(len(piece.rows)).to(whole) / len(piece.rows) if piece.plan is None else piece.plan
            rows, columns = (each.flatten().to(whole.device) for each in (piece.rows, piece.columns))
            whole[rows.unsqueeze(1), columns] = share * block.to(whole)
        return whole


def carried(values: Tensor, axis: int, pieces: Sequence[Piece], role: str, normalisation: str) -> Tensor:
    """``values`` with the source's units along ``axis`` replaced by the anchor's.

    Args:
        values: a weight or any other parameter.
        axis: the one that counts units.
        pieces: how that axis corresponds to the anchor's.
        role: "reads" applies R, anything else L.
        normalisation: of R, as of `etude.merge.alignment.incoming`.
    """
    moved = values.movedim(axis, 0)
    result = moved.new_zeros(sum(piece.columns.numel() for piece in pieces), *moved.shape[1:])
    for piece in pieces:
        taken = moved[piece.rows.to(moved.device)]
        if piece.plan is not None:
            plan = incoming(piece.plan, normalisation) if role == "reads" else outgoing(piece.plan)
            taken = torch.einsum("uk...,uv->vk...", taken, plan.to(taken))
        result[piece.columns.to(moved.device)] = taken
    return result.movedim(0, axis)


def residual_map(
    policy: str,
    stream: Float[Tensor, "n m"],
    branch: Float[Tensor, "n m"],
    magnitudes: tuple[Float[Tensor, "m"], Float[Tensor, "m"]] | None = None,
) -> Float[Tensor, "n m"] | None:
    r"""The map of a residual sum from the maps of its two paths; None stands for the identity.

    Args:
        policy: as ``residual`` of `fuse`.
        stream: plan of the path that passes the layers by.
        branch: plan of the path through them.
        magnitudes: for the weighted policies, the mean absolute values of the anchor's units on stream and branch.

    >>> one, other = torch.eye(2) / 2, torch.ones(2, 2) / 4
    >>> residual_map("mean", one, other).tolist()
    [[0.375, 0.125], [0.125, 0.375]]
    """
    if policy == "identity":
        return None
    if policy in ("stream", "branch"):
        return stream if policy == "stream" else branch
    if policy == "mean":
        return (stream + branch) / 2
    if magnitudes is None:
        raise InputError("got none", where="magnitudes", instead="weighted policies need them")
    on_stream, on_branch = (each.to(stream) for each in magnitudes)
    if policy == "weighted_scalar":
        on_stream, on_branch = on_stream.mean(), on_branch.mean()
    total = on_stream + on_branch
    share = torch.where(total > 0, on_stream / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    return share * stream + (1 - share) * branch


def within_heads(shapes: Sequence[tuple[int, int]], costs: Sequence[Tensor], solvers: Sequence[Solver]) -> list[Tensor]:
    """Plans that move whole heads, the same ones for queries, keys and values, and coordinates inside them.

    Args:
        shapes: for each cost how many sets of neurons are joined in it (queries and keys: 2), and how many heads each
            set forms.
        costs: ground costs, of neurons in the order of sets, then heads.
        solvers: for each cost; the first assigns the heads, at the summed costs of transport between them.
    """
    inner, totals = [], []
    for (parts, heads), cost, solver in zip(shapes, costs, solvers, strict=True):
        rows, columns = cost.shape[0] // parts // heads, cost.shape[1] // parts // heads
        # (parts, heads, dim) on each side, to pairs of heads of (parts and dim) on each side
        table = cost.view(parts, heads, rows, parts, heads, columns).permute(1, 4, 0, 2, 3, 5)
        table = table.reshape(heads, heads, parts * rows, parts * columns)
        plan = solver.plan(table)
        inner.append(plan.view(heads, heads, parts, rows, parts, columns))
        totals.append((plan * table).sum((-1, -2)))
    total = torch.stack(totals).sum(0)
    assignment = solvers[0].plan(total / total.max() if total.max() > 0 else total)
    found = []
    for plan, cost in zip(inner, costs, strict=True):
        mixed = assignment.view(*assignment.shape, 1, 1, 1, 1) * plan
        found.append(mixed.permute(2, 0, 3, 4, 1, 5).reshape(cost.shape))
    return found


def _unequal(where: str, first: int, second: int) -> InputError:
    return InputError(
        f"{first} entries in one model, {second} in the anchor",
        where=where,
        instead="give models with equal inputs, outputs, vocabularies and lengths; only hidden widths may differ",
    )
