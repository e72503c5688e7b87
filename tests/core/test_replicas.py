"""Stacked replicas behave exactly as the networks they stack."""

import copy

import pytest
import torch
from torch import nn

from etude.core.checks import InputError, UnsupportedModuleError
from etude.core.replicas import Replicas


def networks(count: int = 3, *, norm: bool = False) -> list[nn.Module]:
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.ReLU(), nn.Linear(8, 2))

    return [network() for _ in range(count)]


def test_forward_equals_each_network_on_shared_and_own_batches():
    models = networks()
    stacked = Replicas(models)
    shared, own = torch.randn(5, 4), torch.randn(3, 5, 4)
    torch.testing.assert_close(stacked(shared), torch.stack([m(shared) for m in models]))
    expected = torch.stack([m(x) for m, x in zip(models, own, strict=True)])
    torch.testing.assert_close(stacked(own, batches=True), expected)


def test_gradients_equal_each_networks_own():
    models = networks()
    stacked = Replicas(models)
    x = torch.randn(5, 4)
    stacked(x).square().sum().backward()
    for model in models:
        model(x).square().sum().backward()
    for name, stack in stacked.named_stacks().items():
        expected = torch.stack([m.get_parameter(name).grad for m in models])
        torch.testing.assert_close(stack.grad, expected)


def test_unstack_returns_the_networks_and_the_originals_are_untouched():
    models = networks(norm=True)
    before = copy.deepcopy([m.state_dict() for m in models])
    stacked = Replicas(models)
    with torch.no_grad():
        for stack in stacked.named_stacks().values():
            stack.add_(1)
    for model, state, member in zip(models, before, stacked.unstack(), strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])
        assert torch.equal(member[0].weight, model[0].weight + 1)
        assert member.state_dict().keys() == state.keys()


def test_batch_norm_statistics_follow_each_replica():
    models = networks(norm=True)
    stacked = Replicas(models).train()
    x = torch.randn(3, 16, 4)
    stacked(x, batches=True)
    for model, member, batch in zip(models, stacked.unstack(), x, strict=True):
        model.train()(batch)
        torch.testing.assert_close(member[1].running_mean, model[1].running_mean)
        torch.testing.assert_close(member[1].running_var, model[1].running_var)


def test_clipping_is_per_replica():
    stacked = Replicas(networks())
    scale = torch.tensor([100.0, 1.0, 0.001]).view(3, 1, 1)
    (stacked(torch.randn(5, 4)) * scale).sum().backward()
    gradients = {n: p.grad.clone() for n, p in stacked.named_stacks().items()}
    norms = stacked.clip_grad_norm_(1.0)
    expected = torch.stack([torch.cat([g[r].flatten() for g in gradients.values()]).norm() for r in range(3)])
    torch.testing.assert_close(norms, expected)
    after = torch.cat([p.grad.flatten(1) for p in stacked.named_stacks().values()], 1).norm(dim=1)
    torch.testing.assert_close(after, expected.clamp(max=1.0), rtol=1e-4, atol=1e-6)


def test_clipping_can_differ_between_replicas():
    stacked = Replicas(networks())
    (100 * stacked(torch.randn(5, 4))).sum().backward()
    before = stacked.clip_grad_norm_(torch.inf)
    stacked.clip_grad_norm_(torch.tensor([1.0, torch.inf, 2.0]))
    expected = torch.tensor([1.0, before[1].item(), 2.0])
    torch.testing.assert_close(stacked.clip_grad_norm_(torch.inf), expected, rtol=1e-4, atol=1e-6)


def test_state_dict_round_trip_and_deepcopy():
    stacked, other = Replicas(networks(norm=True)), Replicas(networks(norm=True)[::-1])
    x = torch.randn(5, 4)
    other.load_state_dict(stacked.state_dict())
    stacked.eval(), other.eval()
    assert torch.equal(other(x), stacked(x))
    assert torch.equal(copy.deepcopy(stacked)(x), stacked(x))


def test_frozen_parameters_stay_frozen():
    models = networks()
    for model in models:
        model[0].weight.requires_grad_(False)
    stacked = Replicas(models)
    assert not stacked.named_stacks()["0.weight"].requires_grad
    assert stacked.named_stacks()["2.weight"].requires_grad


def test_input_errors():
    with pytest.raises(InputError, match="at least one"):
        Replicas([])
    with pytest.raises(InputError, match=r"models\[1\].*weight"):
        Replicas([nn.Linear(2, 2), nn.Linear(3, 2)])
    with pytest.raises(UnsupportedModuleError, match="LSTM"):
        Replicas([nn.LSTM(2, 2)])
    with pytest.raises(InputError, match="3 replicas"):
        Replicas(networks())(torch.randn(2, 5, 4), batches=True)


def test_stacks_and_back_keep_tied_weights_and_every_buffer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.out.weight = self.into.weight
            self.register_buffer("shift", torch.randn(4), persistent=False)

        def forward(self, x):
            return self.out(self.into(x)) + self.shift

    models = [Tied() for _ in range(3)]
    stacked = Replicas(models)
    assert list(stacked.named_state()) == ["into.weight", "shift"]
    x = torch.randn(5, 4)
    torch.testing.assert_close(stacked(x), torch.stack([model(x) for model in models]))
    for model, member in zip(models, stacked.unstack(), strict=True):
        assert member.into.weight is member.out.weight
        assert torch.equal(member(x), model(x))
    again = Replicas.from_stacks(stacked.structure, {n: 2 * v for n, v in stacked.named_state().items()})
    torch.testing.assert_close(again(x)[1], models[1](x) * 4 - 2 * models[1].shift)
    assert all(value.device.type == "meta" for value in stacked.structure.parameters())


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_take_any_leading_axes(shape, bias):
    models = [nn.Linear(4, 2, bias=bias) for _ in range(3)]
    stacked, x = Replicas(models), torch.randn(shape)
    torch.testing.assert_close(stacked(x), torch.stack([model(x) for model in models]))
    stacked(x).square().sum().backward()
    models[1](x).square().sum().backward()
    gradient = stacked.named_stacks()["weight"].grad
    torch.testing.assert_close(gradient[1], models[1].weight.grad)
    assert gradient.is_contiguous()
