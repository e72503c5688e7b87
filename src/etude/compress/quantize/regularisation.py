r"""Weights drawn to their levels: proximal steps and regularisers for training without a straight-through gradient."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from etude.compress.quantize.learned import ParametricClipQuantizer
from etude.compress.quantize.schemes import Scheme
from etude.compress.quantize.training import layers_in
from etude.core.checks import InputError, check_at_least

__all__ = ["ProximalQuantization", "clip_penalty", "level_penalty", "periodic_penalty"]


class ProximalQuantization:
    r"""Pull float weights to their levels by a proximal step after each optimizer step (ProxQuant).

    The forward stays in floats: no straight-through gradient is involved. After ``optimizer.step()`` number t, every
    weight moves to its nearest level q by :math:`\lambda_t = t\,\lambda` times the learning rate: with power 1,
    the prox of :math:`\lambda_t \sum |w - q|` (the W-shaped regulariser), it stops there; with power 2 it becomes
    :math:`(w + \lambda_t q) / (1 + \lambda_t)`. Afterwards, `quantize` the model with the same scheme.

    Args:
        optimizer: of the model's parameters.
        weights: the parameters to quantise, e.g. ``[layer.weight for layer in ...]``, outputs first.
        scheme: what gives the levels, fitted anew at every step.
        strength: lambda, or a function of the step that gives :math:`\lambda_t`; the paper takes 1e-4.
        power: 1 or 2.

    Attributes:
        step: steps made.

    Bai, Wang and Liberty, ProxQuant, ICLR 2019.

    >>> from etude.compress.quantize import Binary
    >>> weight = nn.Parameter(torch.tensor([[0.5, -1.5]]))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> pull = ProximalQuantization(optimizer, [weight], Binary(), strength=0.2)
    >>> weight.grad = torch.zeros(1, 2)
    >>> optimizer.step()
    >>> [round(each, 2) for each in weight[0].tolist()]
    [0.7, -1.3]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: list[nn.Parameter],
        scheme: Scheme,
        *,
        strength: float | Callable[[int], float] = 1e-4,
        power: int = 1,
    ):
        if power not in (1, 2):
            raise InputError(f"got {power}", where="power", instead="give 1 or 2")
        if not callable(strength):
            check_at_least("strength", strength, 0.0)
        rates = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        if not weights or any(id(each) not in rates for each in weights):
            raise InputError(
                "some are not in the optimizer, or there are none", where="weights", instead="give its parameters"
            )
        self.weights = [(weight, rates[id(weight)]) for weight in weights]
        self.scheme, self.strength, self.power, self.step = scheme, strength, power, 0
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        self._handle.remove()

    def state_dict(self) -> dict[str, int]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved step."""
        self.step = int(state["step"])

    @torch.no_grad()
    def distance(self) -> float:
        """The mean distance of weights to their levels."""
        gaps = [(self.scheme.fit(w.detach())(w.detach()) - w).abs().sum() for w, _ in self.weights]
        return float(torch.stack(gaps).sum()) / sum(w.numel() for w, _ in self.weights)

    @torch.no_grad()
    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.step += 1
        strength = self.strength(self.step) if callable(self.strength) else self.step * self.strength
        for weight, group in self.weights:
            amount = strength * float(group["lr"])
            levels = self.scheme.fit(weight.detach())(weight.detach())
            if self.power == 2:
                weight.copy_((weight + amount * levels) / (1 + amount))
            else:
                gap = weight - levels
                weight.copy_(levels + gap.sign() * (gap.abs() - amount).clamp(min=0))


def periodic_penalty(weight: Float[Tensor, "..."], bits: float | Tensor) -> Float[Tensor, ""]:
    r"""WaveQ's regulariser, zero at the levels: :math:`\sum \sin^2(\pi w (2^\beta - 1)) / 2^\beta`, averaged.

    It adds to the loss of a float model, times a strength that is raised in training. With ``bits`` a parameter beta
    is learned; the paper adds :math:`\lambda_\beta \sum \beta` to shrink it and rounds it up in the end.

    Args:
        weight: in units of the largest magnitude, so that levels are multiples of :math:`1 / (2^\beta - 1)`.
        bits: beta, a number or a tensor with a gradient.

    Elthakeb et al., WaveQ: Gradient-Based Deep Quantization of Neural Networks through Sinusoidal Adaptive
    Regularization, 2020.

    >>> periodic_penalty(torch.tensor([0.0, 1 / 3, -1.0]), 2).item() < 1e-12
    True
    """
    beta = torch.as_tensor(bits, dtype=weight.dtype, device=weight.device)
    if bool((beta.detach() <= 0).any()):
        raise InputError(f"got {beta.detach().tolist()}", where="bits", instead="give a positive number")
    return ((math.pi * weight * (torch.exp2(beta) - 1)).sin().square() / torch.exp2(beta)).mean()


def level_penalty(model: nn.Module, *, power: int = 1) -> Float[Tensor, ""]:
    r"""How far latent weights are from their levels: BNN+'s :math:`\sum \big| \alpha - |w| \big|^p` for any scheme.

    For `Binary` weights with scale alpha the nearest level lies at that distance. Add it to the loss, times a strength.

    Args:
        model: made by `quantize`.
        power: 1 or 2.

    Darabi et al., Regularized Binary Network Training (BNN+), 2018.

    >>> from etude.compress.quantize import Binary, quantize
    >>> model = quantize(nn.Linear(2, 1), Binary())
    >>> _ = model.layer.weight.data.copy_(torch.tensor([[0.5, -1.5]]))
    >>> model.weight_quantizer.coefficients.fill_(1.0)
    tensor([[1.]])
    >>> level_penalty(model, power=2).item()
    0.5
    """
    if power not in (1, 2):
        raise InputError(f"got {power}", where="power", instead="give 1 or 2")
    layers = layers_in(model).values()
    gaps = [layer.master - layer.weight.detach() for layer in layers]
    return torch.stack([gap.abs().pow(power).sum() for gap in gaps]).sum()


def clip_penalty(model: nn.Module) -> Float[Tensor, ""]:
    r"""PACT's :math:`\sum \alpha^2` over the clipping levels of a model's `ParametricClip` quantizers.

    >>> from etude.compress.quantize import ParametricClip, quantize
    >>> model = quantize(nn.Sequential(nn.Linear(2, 2)), None, ParametricClip(4, start=3.0), inputs=torch.ones(1, 2))
    >>> clip_penalty(model).item()
    9.0
    """
    found = [module.alpha.square() for module in model.modules() if isinstance(module, ParametricClipQuantizer)]
    if not found:
        raise InputError("has no ParametricClip quantizer", where="model", instead="quantize activations with it")
    return torch.stack(found).sum()
