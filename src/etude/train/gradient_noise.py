r"""Gradient noise: Gaussian noise on every gradient, with a variance that decays over training.

Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach and Martens, "Adding Gradient Noise Improves Learning for Very Deep
Networks", 2015 (arXiv 1511.06807).

.. math:: g_t \leftarrow g_t + \mathcal{N}(0, \sigma_t^2), \qquad \sigma_t^2 = \frac{\eta}{(1 + t)^\gamma}
   \qquad \text{(eq. 1)}

It is for networks that are hard to start or to search. With a good initialisation a plain deep network does not gain.
It is not a sampler: unlike in stochastic gradient Langevin dynamics the noise is not tied to the learning rate.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etude.core.checks import InputError, check_at_least

__all__ = ["AnnealedNoise", "ConstantNoise", "GradientNoise"]

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class AnnealedNoise:
    r"""The paper's schedule: a standard deviation of :math:`\sqrt{\eta} (1 + t)^{-\gamma / 2}` at step t.

    Args:
        eta: the variance at step 0. The paper used 0.01 (deep networks with SGD), 0.3 and 1.0 (with Adam).
        gamma: how fast the variance decays; 0.55 in the paper, 0 is constant.

    >>> AnnealedNoise(eta=0.01)(0)
    0.1
    """

    eta: float = 0.01
    gamma: float = 0.55

    def __post_init__(self) -> None:
        check_at_least("eta", self.eta, 0.0)
        check_at_least("gamma", self.gamma, 0.0)
        if self.eta > 1:
            warnings.warn(
                f"eta={self.eta:g} is a variance; the paper used 0.01, 0.3 and 1.0", UserWarning, stacklevel=3
            )

    def __call__(self, step: int) -> float:
        """The standard deviation at ``step``, which counts from 0."""
        return math.sqrt(self.eta) * (1 + step) ** (-self.gamma / 2)


@dataclass(frozen=True)
class ConstantNoise:
    """The same standard deviation at every step; the paper's best for memory networks was 0.001.

    Args:
        std: the standard deviation (not the variance).
    """

    std: float

    def __post_init__(self) -> None:
        check_at_least("std", self.std, 0.0)

    def __call__(self, step: int) -> float:
        """The standard deviation at any step."""
        return self.std


class GradientNoise:
    """Adds fresh Gaussian noise to the gradients right before each step of an optimizer.

    It hooks into the optimizer (`torch.optim.Optimizer.register_step_pre_hook`) and so runs after clipping and once a
    step however many micro-batches were accumulated. Parameters without a gradient are left alone. Weight decay that
    an optimizer applies by itself is not disturbed; adaptive optimizers see the noise in their second moments.

    Args:
        optimizer: any torch optimizer.
        eta: variance at step 0 of the paper's schedule (see `AnnealedNoise`).
        schedule: another schedule, from the step's number to a standard deviation; instead of ``eta``.
        clip_norm: clip the gradients to this global norm before the noise is added. The paper clips first: noise
            added before clipping would be washed out by large gradients.
        groups: indices of the parameter groups that get noise; all by default, as in the paper.
        generator: on the parameters' device; by default a fresh one with seed 0. Under data parallelism give every
            process one of the same seed, else replicas drift apart.

    Raises:
        InputError: for unusable arguments; at a step, if no parameter has a gradient, or one is sparse.

    Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks, 2015.

    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> noise = GradientNoise(optimizer, eta=0.01, clip_norm=10.0)
    >>> model(torch.ones(3, 4)).sum().backward()
    >>> optimizer.step()
    >>> noise.step
    1
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        eta: float | None = None,
        *,
        schedule: Schedule | None = None,
        clip_norm: float | None = None,
        groups: Iterable[int] | None = None,
        generator: torch.Generator | None = None,
    ):
        if (eta is None) == (schedule is None):
            raise InputError("got both or neither", where="eta, schedule", instead="give one of them")
        if clip_norm is not None:
            check_at_least("clip_norm", clip_norm, 0.0, strict=True)
        self.schedule: Schedule = AnnealedNoise(eta) if eta is not None else schedule  # type: ignore[assignment]
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.step = 0
        self._groups = self._chosen_groups(groups)
        self._generator = generator
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @property
    def std(self) -> float:
        """The standard deviation of the next step's noise."""
        return self.schedule(self.step)

    def remove(self) -> None:
        """Detach from the optimizer."""
        self._handle.remove()
        self._buffers.clear()

    def ratio(self) -> float:
        """Norm of the next noise, as expected, over that of the current gradients: far above 1 it drowns them."""
        gradients = [parameter.grad for parameter in self._with_gradient()]
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item()
        expected = self.std * math.sqrt(sum(g.numel() for g in gradients if g is not None))
        return expected / norm if norm else math.inf

    def state_dict(self) -> dict[str, Any]:
        """The step and the generator's state, to go on with the same schedule and the same draws."""
        generator = self._own_generator() if self._generator is not None else None
        return {"step": self.step, "generator": None if generator is None else generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.step = int(state["step"])
        if state["generator"] is not None:
            self._own_generator().set_state(state["generator"])

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # The optimizer itself comes first among the arguments.
        if any(argument is not None for argument in (*args[1:], kwargs.get("closure"))):
            raise InputError(
                "the optimizer computes gradients itself", where="closure", instead="call backward, then step()"
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise InputError(
                "gradients are still scaled",
                where="GradScaler",
                instead="call scaler.unscale_(optimizer) before scaler.step(optimizer)",
            )
        parameters = self._with_gradient()
        if not parameters:
            raise InputError("no gradients", where="GradientNoise", instead="call step() after backward()")
        if self.clip_norm is not None:
            # Only the gradients are read and scaled; parameters outside the chosen groups are clipped with the rest.
            everything = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(everything, self.clip_norm)
        std = self.std
        if std:
            self._add(parameters, std)
        self.step += 1

    def _add(self, parameters: list[nn.Parameter], std: float) -> None:
        """Add noise to the gradients: one draw for all that share a device and a dtype, then one fused addition."""
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None, "chosen for having one"
            by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        for (device, dtype), gradients in by_kind.items():
            # Half-precision gradients get noise drawn in float32: their own type would round the small draws away.
            drawn = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
            count = sum(gradient.numel() for gradient in gradients)
            flat = self._buffer(device, drawn, count)
            flat.normal_(0.0, std, generator=self._own_generator())
            parts = [
                part.view_as(gradient)
                for part, gradient in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)
            ]
            if drawn is not dtype:
                sums = [gradient.float().add_(part) for gradient, part in zip(gradients, parts, strict=True)]
                torch._foreach_copy_(gradients, sums)
            else:
                torch._foreach_add_(gradients, parts)

    def _buffer(self, device: torch.device, dtype: torch.dtype, count: int) -> Tensor:
        held = self._buffers.get((device, dtype))
        if held is None or held.numel() != count:
            held = torch.empty(count, device=device, dtype=dtype)
            self._buffers[device, dtype] = held
        return held

    def _own_generator(self) -> torch.Generator:
        if self._generator is None:
            parameters = self._with_gradient() or [self.optimizer.param_groups[0]["params"][0]]
            self._generator = torch.Generator(parameters[0].device).manual_seed(0)
        return self._generator

    def _with_gradient(self) -> list[nn.Parameter]:
        found = []
        for index in self._groups or range(len(self.optimizer.param_groups)):
            for parameter in self.optimizer.param_groups[index]["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.layout is not torch.strided:
                    raise InputError(
                        f"the gradient of a parameter of shape {tuple(parameter.shape)} is sparse",
                        where="GradientNoise",
                        instead="keep that parameter in a group of its own and leave it out with groups=",
                    )
                found.append(parameter)
        return found

    def _chosen_groups(self, groups: Iterable[int] | None) -> tuple[int, ...]:
        chosen = tuple(groups) if groups is not None else ()
        count = len(self.optimizer.param_groups)
        if groups is not None and (not chosen or not all(0 <= index < count for index in chosen)):
            raise InputError(f"got {list(chosen)}", where="groups", instead=f"give indices below {count}")
        return chosen
