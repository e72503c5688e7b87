"""What can be made smaller, and by how much: axes with their choices, and sizes, one choice for each axis."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from etude.core.checks import InputError

__all__ = ["Axis", "Depth", "Heads", "Size", "Width"]


@dataclass(frozen=True)
class Depth:
    """How many blocks of a stack run: the first ones, in order.

    Where several stacks match (the stages of a convolutional network) each keeps as many. A block that changes the
    shape of what it gets cannot be left out: unless it is a stack's first one it always stays, and is not counted. In
    a plain chain of layers (`nn.Sequential`) a block is a layer with what follows it up to the next one; of a chain
    that is the whole model the last one is the head, which always stays, uncounted.

    Args:
        stacks: path or glob of `nn.Sequential` or `nn.ModuleList`; "" is the model itself.
        choices: numbers of blocks, ascending; the last is all.

    >>> Depth("blocks", [1, 2, 3]).choices
    (1, 2, 3)
    """

    stacks: str | Sequence[str]
    choices: Sequence[int]

    def __post_init__(self) -> None:
        _freeze(self)


@dataclass(frozen=True)
class Heads:
    """How many heads of an attention layer work: the first ones, with the matching columns of its output layer.

    The size of a head and the scale of its scores stay. Where several queries share a key and a value, choices are
    numbers of queries' heads, and whole groups.

    Args:
        modules: path or glob of modules that compute attention.
        choices: numbers of heads, ascending; the last is all.
        count: the attribute that counts heads, where the module calls it by an uncommon name.
    """

    modules: str | Sequence[str]
    choices: Sequence[int]
    count: str | None = None

    def __post_init__(self) -> None:
        _freeze(self)


@dataclass(frozen=True)
class Width:
    """How many units of a layer work: the first ones of those it writes, with whatever reads or normalises them.

    A layer inside a block narrows the block; one that writes into a residual stream (a patch embedding, token
    embedding, the first convolution) narrows the stream and all that is added to it, norms and tables included.

    Args:
        layers: path or glob of linear, convolution or embedding layers.
        choices: numbers of units, ascending; the last is all.
        parts: count ``choices`` in such parts of each layer's width, for layers of several widths: ``parts=8`` with
            choices 2, 4, 8 are a quarter, a half, and all of each.
    """

    layers: str | Sequence[str]
    choices: Sequence[int]
    parts: int | None = None

    def __post_init__(self) -> None:
        _freeze(self)


Axis = Depth | Heads | Width


def _freeze(axis: Axis) -> None:
    """Hold choices as a tuple, so that an axis cannot change under a space."""
    choices = tuple(axis.choices)
    where = f"{type(axis).__name__} choices"
    if not choices:
        raise InputError("got none", where=where, instead="give at least one, the full size")
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 1 for each in choices):
        raise InputError(f"got {list(choices)}", where=where, instead="give whole numbers from 1 up")
    if list(choices) != sorted(choices):
        raise InputError(f"got {list(choices)}", where=where, instead="give them ascending")
    object.__setattr__(axis, "choices", choices)


class Size(Mapping[str, int]):
    """One choice for each axis: names a sub-network. Hashable; ``a <= b`` means that a lies within b.

    >>> small, large = Size(depth=1, width=8), Size(depth=2, width=8)
    >>> small <= large, large <= small, small["depth"]
    (True, False, 1)
    """

    def __init__(self, choices: Mapping[str, int] | None = None, **named: int):
        self._choices = {**(choices or {}), **named}
        self._hash = hash(tuple(sorted(self._choices.items())))

    def __getitem__(self, axis: str) -> int:
        return self._choices[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Size):
            return self._choices == other._choices
        return isinstance(other, Mapping) and self._choices == dict(other)

    def __hash__(self) -> int:
        return self._hash

    def __le__(self, other: "Size") -> bool:
        return self.keys() == other.keys() and all(self[axis] <= other[axis] for axis in self)

    def __ge__(self, other: "Size") -> bool:
        return other <= self

    def __repr__(self) -> str:
        return f"Size({', '.join(f'{axis}={choice}' for axis, choice in self._choices.items())})"
