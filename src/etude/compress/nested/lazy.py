"""Optimizer steps that leave untouched entries of shared tensors alone."""

from typing import Any

import torch
from torch import Tensor

from etude.compress.nested.axes import Size
from etude.compress.nested.space import SubnetSpace

__all__ = ["LazyUpdates"]


class LazyUpdates:
    """Has an optimizer update only entries that lie in a sub-network drawn since its last step.

    Of parameters touched in part, values and the optimizer's state of the rest are put back after each step;
    parameters not touched at all it does not get to see.

    Args:
        space: the sub-networks.
        optimizer: any; state of a parameter's shape is taken to be one number for each entry.
    """

    def __init__(self, space: SubnetSpace, optimizer: torch.optim.Optimizer):
        self.space = space
        self._touched: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
        self._hidden: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._put_back)

    def touch(self, size: Size) -> None:
        """Note that a sub-network was drawn."""
        if not self._touched:
            self._touched = {
                name: torch.zeros(value.shape, dtype=torch.bool, device=value.device)
                for name, value in self.space.model.named_parameters()
            }
        for name, region in self.space.regions(size).items():
            self._touched[name][region] = True

    def _remember(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._touched:
            return
        for name, parameter in self.space.model.named_parameters():
            mask = self._touched[name]
            if parameter.grad is None or mask.all():
                continue
            if not mask.any():
                self._hidden[name], parameter.grad = parameter.grad, None
                continue
            self._before[name] = (
                parameter.detach().clone(),
                {
                    key: value.clone()
                    for key, value in optimizer.state[parameter].items()
                    if _for_each_entry(value, mask)
                },
            )

    @torch.no_grad()
    def _put_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = dict(self.space.model.named_parameters())
        for name, (values, state) in self._before.items():
            untouched, parameter = ~self._touched[name], parameters[name]
            parameter[untouched] = values[untouched]
            for key, value in optimizer.state[parameter].items():
                if _for_each_entry(value, untouched):
                    value[untouched] = state[key][untouched] if key in state else 0
        for name, gradient in self._hidden.items():
            parameters[name].grad = gradient
        self._touched, self._before, self._hidden = {}, {}, {}


def _for_each_entry(value: Any, mask: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == mask.shape
