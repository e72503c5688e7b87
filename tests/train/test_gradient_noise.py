"""Gradient noise: its law, its place in the step, and what it leaves alone."""

import copy
import math

import pytest
import torch
from torch import nn

from etude.core.checks import InputError
from etude.train import AnnealedNoise, ConstantNoise, GradientNoise


def parameter(count, value=0.0):
    tensor = nn.Parameter(torch.full((count,), value))
    tensor.grad = torch.zeros(count)
    return tensor


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_law_of_the_injected_noise():
    weight = parameter(1_000_000)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    noise = GradientNoise(optimizer, eta=0.3, generator=generator())
    for step in (0, 1, 999):
        noise.step = step
        weight.grad.zero_()
        optimizer.step()
        expected = 0.3 / (1 + step) ** 0.55
        # 1e6 draws: the sample variance has a relative standard deviation of sqrt(2 / 1e6).
        assert abs(weight.grad.var().item() / expected - 1) < 5 * math.sqrt(2e-6)
        assert abs(weight.grad.mean().item()) < 5 * math.sqrt(expected / 1e6)
    assert (AnnealedNoise(1.0)(0) / AnnealedNoise(1.0)(999)) ** 2 == pytest.approx(1000**0.55)


def test_a_constant_loss_becomes_a_random_walk():
    weight = parameter(100_000)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    GradientNoise(optimizer, eta=0.01, generator=generator())
    for _ in range(50):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    expected = 0.1**2 * 0.01 * sum((1 + t) ** -0.55 for t in range(50))
    assert weight.var().item() == pytest.approx(expected, rel=0.03)


def test_no_noise_is_the_bare_optimizer_and_draws_nothing():
    draws = generator()
    before, outer = draws.get_state(), torch.get_rng_state()
    plain, noisy = parameter(10, 1.0), parameter(10, 1.0)
    optimizers = [torch.optim.Adam([plain]), torch.optim.Adam([noisy])]
    GradientNoise(optimizers[1], eta=0.0, generator=draws)
    for _ in range(3):
        for weight, optimizer in zip((plain, noisy), optimizers, strict=True):
            weight.grad = weight.detach().clone()
            optimizer.step()
    assert torch.equal(plain, noisy)
    assert torch.equal(draws.get_state(), before)
    assert torch.equal(torch.get_rng_state(), outer)


def test_a_network_of_zeros_is_dead_without_noise_and_wakes_with_it():
    inputs, targets = torch.randn(20, 4, generator=generator()), torch.arange(20) % 3
    for eta, dead in ((0.0, True), (0.1, False)):
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
        for value in model.parameters():
            nn.init.zeros_(value)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        GradientNoise(optimizer, eta=eta)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        assert all((value == 0).all() for value in list(model.parameters())[:-1]) is dead


def test_noise_comes_after_clipping():
    norms, rest = [], []
    for scale in (1e3, 1e6):
        weight = parameter(1000)
        optimizer = torch.optim.SGD([weight], lr=0.0)
        GradientNoise(optimizer, eta=1.0, clip_norm=1.0, generator=generator())
        weight.grad = torch.full((1000,), scale)
        optimizer.step()
        norms.append(weight.grad.norm().item())
        rest.append((weight.grad - torch.full((1000,), 1000**-0.5)).norm().item())
    assert min(norms) > 1.0
    assert rest[0] == pytest.approx(rest[1], rel=1e-3) == pytest.approx(math.sqrt(1000), rel=0.1)


def test_accumulated_batches_get_noise_once():
    weight = parameter(200_000)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    noise = GradientNoise(optimizer, eta=0.5, generator=generator())
    for _ in range(4):
        (weight * 0.0).sum().backward()
    optimizer.step()
    assert noise.step == 1
    assert weight.grad.var().item() == pytest.approx(0.5, rel=0.02)


def test_it_equals_the_formula_for_the_same_draws():
    weights = [parameter(7, 1.0), parameter(5, 2.0)]
    optimizer = torch.optim.SGD(weights, lr=0.0)
    noise = GradientNoise(optimizer, eta=0.3, generator=generator(3))
    noise.step = 9
    optimizer.step()
    reference = generator(3)
    expected = torch.empty(12).normal_(0.0, math.sqrt(0.3 / 10**0.55), generator=reference)
    torch.testing.assert_close(torch.cat([w.grad for w in weights]), expected)


def test_stationary_variance_on_a_quadratic():
    weight = parameter(20_000)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    GradientNoise(optimizer, schedule=ConstantNoise(0.5), generator=generator())
    for _ in range(300):
        weight.grad = 2.0 * weight.detach()
        optimizer.step()
    assert weight.var().item() == pytest.approx(0.1 * 0.25 / (2.0 * (2 - 0.1 * 2.0)), rel=0.03)


def test_a_resumed_run_goes_on_with_the_same_draws():
    def begin(seed=0):
        weight = parameter(10)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        return weight, optimizer, GradientNoise(optimizer, eta=0.1, generator=generator(seed))

    def steps(weight, optimizer, count):
        for _ in range(count):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()

    whole, optimizer, _ = begin()
    steps(whole, optimizer, 6)
    first, optimizer, noise = begin()
    steps(first, optimizer, 3)
    state = copy.deepcopy(noise.state_dict())
    second, optimizer, noise = begin(seed=5)
    with torch.no_grad():
        second.copy_(first)
    noise.load_state_dict(state)
    steps(second, optimizer, 3)
    assert torch.equal(whole, second)
    other, optimizer, _ = begin(seed=1)
    steps(other, optimizer, 6)
    assert not torch.equal(whole, other)


def test_parameters_without_gradient_and_other_groups_are_left_alone():
    used, unused, other = parameter(3, 1.0), parameter(3, 1.0), parameter(3, 1.0)
    unused.grad = None
    optimizer = torch.optim.SGD([{"params": [used, unused]}, {"params": [other]}], lr=1.0)
    GradientNoise(optimizer, eta=0.1, groups=[0])
    optimizer.step()
    assert (used != 1).all()
    assert torch.equal(unused, torch.ones(3))
    assert unused.grad is None
    assert torch.equal(other, torch.ones(3))


def test_removed_noise_is_gone():
    weight = parameter(3, 1.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    GradientNoise(optimizer, eta=0.1).remove()
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_keeps_its_class_and_steps(kind):
    model = nn.Linear(4, 2)
    optimizer = kind(model.parameters(), lr=0.1)
    noise = GradientNoise(optimizer, eta=0.01)
    before = model.weight.detach().clone()
    model(torch.ones(2, 4)).sum().backward()
    assert noise.ratio() > 0
    optimizer.step()
    assert type(optimizer) is kind
    assert not torch.equal(model.weight, before)


def test_low_precision_gradients_keep_their_dtype():
    weight = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    GradientNoise(optimizer, eta=0.25, generator=generator())
    optimizer.step()
    assert weight.grad.dtype is torch.bfloat16
    assert weight.grad.float().var().item() == pytest.approx(0.25, rel=0.03)


def test_unusable_input():
    weight = parameter(3)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for arguments, message in [
        ({"eta": -1.0}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({}, "both or neither"),
        ({"eta": 0.1, "schedule": ConstantNoise(0.1)}, "both or neither"),
        ({"eta": 0.1, "clip_norm": 0.0}, "clip_norm"),
        ({"eta": 0.1, "groups": [1]}, "indices below 1"),
    ]:
        with pytest.raises(InputError, match=message):
            GradientNoise(optimizer, **arguments)
    with pytest.raises(InputError, match="gamma"):
        AnnealedNoise(0.1, gamma=-1)
    with pytest.warns(UserWarning, match="variance"):
        AnnealedNoise(2.0)
    noise = GradientNoise(optimizer, eta=0.1)
    with pytest.raises(InputError, match="closure"):
        optimizer.step(lambda: 0.0)
    weight.grad = None
    with pytest.raises(InputError, match=r"step\(\) after backward"):
        optimizer.step()
    noise.remove()
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    GradientNoise(optimizer, eta=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()
