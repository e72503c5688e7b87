"""Several networks of one architecture trained as one: their parameters stacked along a leading axis."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

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
        # Kept outside the module tree: it lends its structure only, its values are never used.
        self.__dict__["_skeleton"] = copy.deepcopy(models[0]).to("meta")
        self._frozen = {name for name, value in models[0].named_parameters() if not value.requires_grad}
        self.stacked = nn.ParameterDict()
        self._names: dict[str, str] = {}
        for name, value in parameters.items():
            self._names[name] = name.replace(".", "/")
            stacked = nn.Parameter(value.detach().clone(), requires_grad=name not in self._frozen)
            self.stacked[self._names[name]] = stacked
        self._buffer_names = {name: "buffer/" + name.replace(".", "/") for name in buffers}
        for name, value in buffers.items():
            self.register_buffer(self._buffer_names[name], value.detach().clone())

    def __len__(self) -> int:
        return int(next(iter(self.stacked.values())).shape[0])

    def named_stacks(self) -> dict[str, nn.Parameter]:
        """The stacked parameters, ``(R, ...)`` each, under the single network's names."""
        return {name: self.stacked[key] for name, key in self._names.items()}

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
        state = {**self.named_stacks(), **{n: getattr(self, key) for n, key in self._buffer_names.items()}}

        def single(values: dict[str, Tensor], batch: Tensor) -> Any:
            return functional_call(self._skeleton, values, (batch,))

        # Fused attention kernels have no batching rule: they would run one replica after another.
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(single, in_dims=(0, 0 if batches else None), randomness="different")(state, x)

    def train(self, mode: bool = True) -> "Replicas":
        """Set training mode on every replica."""
        super().train(mode)
        self._skeleton.train(mode)
        return self

    def unstack(self) -> list[nn.Module]:
        """The replicas as ordinary networks of their own, in order."""
        networks = []
        device = next(iter(self.stacked.values())).device
        for index in range(len(self)):
            network = copy.deepcopy(self._skeleton).to_empty(device=device)
            state = {name: value[index] for name, value in self.named_stacks().items()}
            state |= {name: getattr(self, key)[index] for name, key in self._buffer_names.items()}
            network.load_state_dict(state, strict=False, assign=False)
            networks.append(network)
        return networks

    def clip_grad_norm_(self, maximum: float) -> Tensor:
        """Clip each replica's gradient to a global norm of ``maximum``, as if it were alone.

        Returns:
            The norms before clipping, ``(R,)``.
        """
        gradients = [p.grad for p in self.stacked.values() if p.grad is not None]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        factors = (maximum / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
        return norms


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
