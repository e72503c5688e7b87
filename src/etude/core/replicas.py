"""Several networks of one architecture trained as one: their parameters stacked along a leading axis."""

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from etude.core.checks import InputError, UnsupportedModuleError

__all__ = ["Replicas"]


class Replicas(nn.Module):
    r"""R networks of equal architecture as one module: :math:`f(x)_r = f(x_r;\, \theta_r)`.

    Parameters and buffers are stacked along a leading axis, so one batched matrix product serves every
    replica. Element-wise optimisers (SGD, Adam and kin) and a loss summed over replicas train each replica
    exactly as if it were alone; a global gradient norm must be taken for each replica (`clip_grad_norm_`).

    Args:
        models: the networks; their states are copied, they themselves are left alone.

    Shape:
        - Input: ``(batch, ...)``, shared, or ``(R, batch, ...)`` with ``batches=True``.
        - Output: ``(R, batch, ...)``.

    Dropout draws differ between replicas. Modules whose forward depends on the data's values in Python are
    beyond `torch.vmap` and raise its error.

    >>> nets = Replicas([torch.nn.Linear(4, 2) for _ in range(3)])
    >>> nets(torch.zeros(5, 4)).shape
    torch.Size([3, 5, 2])
    """

    _skeleton: nn.Module

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        if not models:
            raise InputError("got no model", where="models", instead="give at least one")
        _check_alike(models)
        parameters, buffers = stack_module_state(list(models))
        self._hold(models[0], {**parameters, **buffers})

    @classmethod
    def from_stacks(cls, structure: nn.Module, stacks: Mapping[str, Tensor]) -> "Replicas":
        """Replicas of the architecture ``structure`` that hold copies of ``stacks``.

        Args:
            structure: one network; its values are not used.
            stacks: every parameter and buffer of it by name, ``(R, ...)`` each, as `named_state` gives them.

        >>> nets = Replicas([torch.nn.Linear(4, 2) for _ in range(3)])
        >>> len(Replicas.from_stacks(nets.structure, nets.named_state()))
        3
        """
        replicas = cls.__new__(cls)
        nn.Module.__init__(replicas)
        replicas._hold(structure, stacks)
        return replicas

    def _hold(self, structure: nn.Module, stacks: Mapping[str, Tensor]) -> None:
        # Kept outside the module tree: it lends its structure only, its values are never used.
        self.__dict__["_skeleton"] = _without_values(structure)
        self._count = len(next(iter(stacks.values())))
        self.stacked = nn.ParameterDict()
        self._names: dict[str, str] = {}
        for name, value in structure.named_parameters():
            self._names[name] = name.replace(".", "/")
            stacked = nn.Parameter(stacks[name].detach().clone(), requires_grad=value.requires_grad)
            self.stacked[self._names[name]] = stacked
        self._buffer_names = {name: "buffer/" + name.replace(".", "/") for name, _ in structure.named_buffers()}
        for name, key in self._buffer_names.items():
            self.register_buffer(key, stacks[name].detach().clone())
        self.training = structure.training

    def __len__(self) -> int:
        return self._count

    @property
    def structure(self) -> nn.Module:
        """One network of the stack without its values, on the device ``meta``: to look at, not to compute with."""
        return self._skeleton

    def named_stacks(self) -> dict[str, nn.Parameter]:
        """The stacked parameters, ``(R, ...)`` each, under the single network's names."""
        return {name: self.stacked[key] for name, key in self._names.items()}

    def named_state(self) -> dict[str, Tensor]:
        """The stacked parameters and buffers, ``(R, ...)`` each, under the single network's names."""
        return {**self.named_stacks(), **{name: getattr(self, key) for name, key in self._buffer_names.items()}}

    def forward(self, x: Tensor, *, batches: bool = False) -> Tensor:
        """Apply every replica.

        Args:
            x: one batch shared by all replicas or, with ``batches``, one for each: ``(R, batch, ...)``.
            batches: whether the first axis of ``x`` counts replicas.
        """
        if batches and (x.dim() < 2 or x.shape[0] != len(self)):
            raise InputError(
                f"got shape {tuple(x.shape)} for {len(self)} replicas",
                where="input",
                instead="give (replicas, batch, ...), or batches=False for one shared batch",
            )

        def single(values: dict[str, Tensor], batch: Tensor) -> Any:
            return functional_call(self._skeleton, values, (batch,))

        # Fused attention kernels have no batching rule: they would run one replica after another.
        with sdpa_kernel(SDPBackend.MATH), _LinearFromTheLeft():
            return vmap(single, in_dims=(0, 0 if batches else None), randomness="different")(self.named_state(), x)

    def train(self, mode: bool = True) -> "Replicas":
        """Set training mode on every replica."""
        super().train(mode)
        self._skeleton.train(mode)
        return self

    def unstack(self) -> list[nn.Module]:
        """The replicas as ordinary networks of their own, in order."""
        state = self.named_state()
        named = dict(chain(self._skeleton.named_parameters(), self._skeleton.named_buffers()))
        return [copy.deepcopy(self._skeleton, _in_place_of(named, state, index)) for index in range(len(self))]

    def clip_grad_norm_(self, maximum: float | Tensor) -> Tensor:
        """Clip each replica's gradient to a global norm of ``maximum``, as if it were alone.

        Args:
            maximum: one for all, or ``(R,)`` with one for each; infinity leaves a replica's gradient as it is.

        Returns:
            The norms before clipping, ``(R,)``.
        """
        gradients = [p.grad for p in self.stacked.values() if p.grad is not None]
        norms = torch.cat([gradient.flatten(1) for gradient in gradients], 1).norm(dim=1)
        factors = (maximum / (norms + 1e-6)).clamp(max=1.0)
        if not (factors >= 1).all():
            for gradient in gradients:
                gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
        return norms


class _LinearFromTheLeft(TorchFunctionMode):
    """Linear layers as ``(W x^T)^T``.

    Batched over replicas, ``x W^T`` has a weight gradient of transposed strides, which autograd copies into the
    weights' own layout at every step; that costs as much as the products themselves.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_linear if func is F.linear else func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    columns = input.reshape(-1, input.shape[-1]).T
    rows = weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return rows.T.reshape(*input.shape[:-1], len(weight))


def _without_values(network: nn.Module) -> nn.Module:
    """A copy on the device ``meta``; unlike after ``network.to("meta")``, tied parameters stay tied in it."""
    empty: dict[int, Any] = {}
    for parameter in network.parameters():
        empty[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in network.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, empty)


def _in_place_of(named: Mapping[str, Tensor], state: Mapping[str, Tensor], index: int) -> dict[int, Any]:
    """For `copy.deepcopy`: what to put in the place of each named tensor, the member ``index`` of its stack."""
    memo: dict[int, Any] = {}
    for name, value in named.items():
        member = state[name][index].detach().clone()
        memo[id(value)] = nn.Parameter(member, value.requires_grad) if isinstance(value, nn.Parameter) else member
    return memo


def _check_alike(models: Sequence[nn.Module]) -> None:
    shapes = {name: value.shape for name, value in models[0].state_dict().items()}
    for index, model in enumerate(models[1:], start=1):
        other = {name: value.shape for name, value in model.state_dict().items()}
        if other != shapes:
            name = next(n for n in {**shapes, **other} if shapes.get(n) != other.get(n))
            raise InputError(
                f"{name!r} is {other.get(name)} there and {shapes.get(name)} in models[0]",
                where=f"models[{index}]",
                instead="stack networks of one architecture",
            )
    for path, module in models[0].named_modules():
        if isinstance(module, nn.modules.rnn.RNNBase):
            raise UnsupportedModuleError(path, module, "recurrent kernels cannot be batched over replicas")
