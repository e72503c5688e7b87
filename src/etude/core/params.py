"""Parameters by name: flatten, restore, and mask them."""

import copy
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from etude.core.checks import InputError, UnsupportedModuleError, nearest

__all__ = ["bake_masks", "bare_name", "bare_state", "flatten", "mask_parameters", "owners", "unflatten"]


def flatten(parameters: Mapping[str, Tensor]) -> Float[Tensor, "total"]:
    """All values as one vector, in the mapping's order.

    >>> flatten({"a": torch.ones(2, 2), "b": torch.zeros(1)})
    tensor([1., 1., 1., 1., 0.])
    """
    return torch.cat([value.reshape(-1) for value in parameters.values()])


def unflatten(vector: Float[Tensor, "total"], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a vector back into tensors shaped as those of ``like``.

    >>> unflatten(torch.arange(5.0), {"a": torch.ones(2, 2), "b": torch.zeros(1)})["b"]
    tensor([4.])
    """
    sizes = [value.numel() for value in like.values()]
    if len(vector) != sum(sizes):
        raise InputError(f"got {len(vector)} values for {sum(sizes)}", where="vector", instead="flatten the same names")
    parts = vector.split(sizes)
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each parameter, by its first name, the modules that hold it and under which attribute.

    A tied parameter has several owners.
    """
    first: dict[int, str] = {}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for attribute, value in module._parameters.items():
            if value is not None:
                name = first.setdefault(id(value), f"{path}.{attribute}" if path else attribute)
                found.setdefault(name, []).append((module, attribute))
    return found


def bare_name(name: str) -> str:
    """A parameter's name as it is without parametrizations.

    >>> bare_name("encoder.parametrizations.weight.original")
    'encoder.weight'
    """
    return name.replace("parametrizations.", "").removesuffix(".original")


def bare_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers under their bare names, masked ones with their masks applied."""
    masks = dict(_masks(model))
    state = {}
    for name, value in model.state_dict().items():
        if not name.endswith(".0.mask"):
            mask = masks.get(name)
            state[bare_name(name)] = (value if mask is None else value.masked_fill(~mask, 0)).detach().clone()
    return state


def mask_parameters(model: nn.Module, masks: Mapping[str, Bool[Tensor, "..."]]) -> nn.Module:
    """A copy of ``model`` in which masked-out weights are zero in every forward and get no gradient.

    The masks are parametrizations (`torch.nn.utils.parametrize`) and lie in the ``state_dict``; a tied
    parameter has one mask wherever it is used.

    Args:
        model: any module; it is left as it is.
        masks: for parameters' names, what to keep.

    Raises:
        InputError: for a name that is no parameter, or a mask of another shape.

    >>> masked = mask_parameters(nn.Linear(2, 1), {"weight": torch.tensor([[True, False]])})
    >>> masked.weight[0, 1].item()
    0.0
    """
    network = copy.deepcopy(model)
    places = owners(network)
    for name, mask in masks.items():
        if name not in places:
            raise InputError("no such parameter", where=f"mask {name!r}", instead=nearest(name, places))
        for module, attribute in places[name]:
            value = getattr(module, attribute)
            if value.shape != mask.shape:
                raise InputError(
                    f"{tuple(mask.shape)} for a parameter of {tuple(value.shape)}",
                    where=f"mask {name!r}",
                    instead="give one entry for each weight",
                )
            parametrize.register_parametrization(module, attribute, _Mask(mask.to(value.device)))
    return network


def bake_masks(model: nn.Module) -> nn.Module:
    """A copy of a masked model as an ordinary one: plain parameters in which masked-out weights are zero.

    Tied parameters stay tied.
    """
    network = copy.deepcopy(model)
    baked: dict[int, nn.Parameter] = {}
    for path, module in list(network.named_modules()):
        if parametrize.is_parametrized(module):
            _bake(module, path, baked)
    return network


def _bake(module: nn.Module, path: str, baked: dict[int, nn.Parameter]) -> None:
    """Undo the masks of one module.

    `torch.nn.utils.parametrize.remove_parametrizations` takes the property off the class, which copies share: the
    masked original would lose its weight. The class is changed instead.
    """
    values = {}
    for attribute, steps in module.parametrizations.items():  # type: ignore[union-attr, operator]
        if not all(isinstance(step, _Mask) for step in steps):
            raise UnsupportedModuleError(
                path, module, f"its {attribute!r} has a parametrization besides the mask", instead="remove that first"
            )
        fresh = nn.Parameter(getattr(module, attribute).detach().clone(), steps.original.requires_grad)
        values[attribute] = baked.setdefault(id(steps.original), fresh)
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for attribute, value in values.items():
        module.register_parameter(attribute, value)


class _Mask(nn.Module):
    """The parametrization that shows zero wherever the mask is False."""

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, "..."]):
        super().__init__()
        self.register_buffer("mask", mask.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight, in the weight's dtype."""
        # Selected rather than multiplied: what lies under a mask may have become infinite.
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Any weight may be assigned; its masked-out entries do not show."""
        return weight


def _masks(model: nn.Module) -> Sequence[tuple[str, Tensor]]:
    return [
        (name.removesuffix(".0.mask") + ".original", value)
        for name, value in model.state_dict().items()
        if name.endswith(".0.mask")
    ]
