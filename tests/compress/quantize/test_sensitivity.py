"""Curvature against exact Hessians, allocation against brute force, and what else mixed precision needs."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude.compress.quantize import (
    SearchedBits,
    Sensitivity,
    Uniform,
    allocate_bits,
    evolve_bits,
    expected_bits,
    freeze_quantizers,
    hessian_eigenvalues,
    hessian_traces,
    latencies,
    layer_sensitivity,
    multiplications,
    pareto_front,
    quantize,
)
from etude.compress.quantize.sensitivity import channelwise
from etude.core.checks import InputError


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def batch(seed=0, count=40):
    x = torch.randn(count, 5, generator=generator(seed))
    return x, torch.randint(0, 3, (count,), generator=generator(seed + 1))


def loss(model, rows):
    return F.cross_entropy(model(rows[0]), rows[1])


WEIGHTS = ["0.weight", "2.weight", "4.weight"]


def exact_blocks(model, batches):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def total(name):
        def function(value):
            given = {**parameters, name: value}
            losses = [F.cross_entropy(torch.func.functional_call(model, given, (x,)), y) for x, y in batches]
            return torch.stack(losses).mean()

        return torch.autograd.functional.hessian(function, parameters[name]).reshape(parameters[name].numel(), -1)

    return {name: total(name) for name in WEIGHTS}


class TestCurvature:
    def test_traces(self):
        model, batches = network(), [batch(0), batch(7)]
        exact = exact_blocks(model, batches)
        found = hessian_traces(model, loss, batches, WEIGHTS, probes=400, generator=generator(3))
        for name in WEIGHTS:
            trace = exact[name].trace().item()
            assert abs(found[name].value - trace) < 3 * found[name].error
            assert found[name].error < 0.2 * trace

    def test_standard_error(self):
        model, batches = network(), [batch()]
        runs = [hessian_traces(model, loss, batches, WEIGHTS, probes=20, generator=generator(s)) for s in range(60)]
        for name in WEIGHTS:
            spread = torch.tensor([each[name].value for each in runs]).std()
            told = torch.tensor([each[name].error for each in runs]).square().mean().sqrt()
            assert 0.7 < spread / told < 1.4

    def test_eigenvalues(self):
        model, batches = network(), [batch(0), batch(7)]
        exact = exact_blocks(model, batches)
        found = hessian_eigenvalues(model, loss, batches, WEIGHTS, iterations=300, tolerance=1e-7)
        for name in WEIGHTS:
            values = torch.linalg.eigvalsh(exact[name])
            wanted = values[values.abs().argmax()].item()
            assert abs(found[name] - wanted) < 1e-2 * abs(wanted)

    def test_leaves_the_model_as_it_is(self):
        model = network().train()
        model[0].weight.requires_grad_(False)
        first = hessian_traces(model, loss, [batch()], WEIGHTS, probes=4)
        assert first == hessian_traces(model, loss, [batch()], WEIGHTS, probes=4)
        assert model.training
        assert not model[0].weight.requires_grad
        assert all(p.grad is None for p in model.parameters())

    def test_attention(self):
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"))
        x = torch.randn(4, 5, 8, generator=generator())
        found = hessian_traces(
            model, lambda model, x: model(x).square().mean(), [x], ["0.self_attn.in_proj_weight"], probes=3
        )
        assert math.isfinite(found["0.self_attn.in_proj_weight"].value)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((loss, [batch()], ["0.wait"]), "no such parameter"),
            ((loss, [], WEIGHTS), "no batch"),
            ((loss, [batch()], []), "at least one"),
            ((lambda model, rows: model(rows[0]), [batch()], WEIGHTS), "finite number"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(InputError, match=message):
            hessian_traces(network(), *arguments)


class TestSensitivity:
    def test_trace(self):
        model, batches = network(), [batch()]
        exact = exact_blocks(model, batches)
        table = layer_sensitivity(model, batches, bits=(8, 2, 4), loss=loss, probes=300)
        assert table.layers == ("0", "2", "4")
        assert table.bits == (2, 4, 8)
        for row, name in enumerate(WEIGHTS):
            weight = model.get_parameter(name).detach()
            for column, bits in enumerate(table.bits):
                change = (channelwise(bits).fit(weight)(weight) - weight).square().sum()
                wanted = exact[name].trace() / weight.numel() * change
                torch.testing.assert_close(table.costs[row, column], wanted, rtol=0.4, atol=0)
        assert table.weights.tolist() == [30.0, 24.0, 12.0]
        assert "8 bits" in table.summary()
        assert len(table.plot().lines) == 3

    def test_eigenvalue(self):
        model = network()
        table = layer_sensitivity(model, [batch()], method="eigenvalue", loss=loss)
        exact = exact_blocks(model, [batch()])
        for row, name in enumerate(WEIGHTS):
            weight = model.get_parameter(name).detach()
            top = torch.linalg.eigvalsh(exact[name]).abs().max()
            change = (channelwise(2).fit(weight)(weight) - weight).square().sum()
            torch.testing.assert_close(table.costs[row, 0], top * change, rtol=0.05, atol=0)

    def test_divergence(self):
        model, (x, _) = network(), batch()
        before = copy.deepcopy(model.state_dict())
        table = layer_sensitivity(model, [x[:10], x[10:]], method="divergence")
        wanted = model(x).log_softmax(-1)
        for row, path in enumerate(table.layers):
            for column, bits in enumerate(table.bits):
                one = quantize(model, None, overrides={path: (channelwise(bits), None)})
                divergence = (wanted.exp() * (wanted - one(x).log_softmax(-1))).sum(-1).mean()
                torch.testing.assert_close(table.costs[row, column], divergence.detach(), atol=1e-6, rtol=1e-3)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())

    def test_transformers(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8,
            patch_size=4, num_labels=3,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config).eval()
        images = torch.randn(6, 3, 8, 8, generator=generator())
        table = layer_sensitivity(model, [images], method="divergence", bits=(2, 8))
        assert (table.costs[:, 0] > table.costs[:, 1]).float().mean() > 0.7
        rows = [(images, torch.tensor([0, 1, 2, 0, 1, 2]))]
        curved = layer_sensitivity(
            model, rows, loss=lambda model, rows: F.cross_entropy(model(rows[0]).logits, rows[1]), probes=3
        )
        assert torch.isfinite(curved.costs).all()

    def test_bad_input(self):
        with pytest.raises(InputError, match="divergence"):
            layer_sensitivity(network(), [batch()])
        with pytest.raises(InputError, match="divergence"):
            layer_sensitivity(network(), [batch()], method="divergance")
        with pytest.raises(InputError, match="bits"):
            layer_sensitivity(network(), [batch()], bits=(), loss=loss)

    def test_multiplications(self):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
        x = torch.zeros(3, 4, 6, 6)
        assert multiplications(model, x) == {"0": 16 * 6 * 2 * 9, "3": 480}
        assert multiplications(quantize(model, Uniform(4)), x) == {"0": 16 * 6 * 2 * 9, "3": 480}

    def test_latencies(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 512), nn.Linear(512, 512))
        found = latencies({4: model, 8: model}, torch.randn(256, 8), ["0", "2"], repeats=5)
        assert found.shape == (2, 2)
        assert (found[1] > found[0]).all()
        assert (found > 0).all()
        with pytest.raises(InputError, match="'5'"):
            latencies({8: model}, torch.randn(2, 8), ["5"])


def table(layers=6, seed=0):
    draws = generator(seed)
    costs = torch.rand(layers, 3, generator=draws).exp().cumsum(1).flip(1) * torch.logspace(-3, 3, layers).unsqueeze(1)
    weights = torch.randint(10, 1000, (layers,), generator=draws).float()
    return Sensitivity(tuple(f"layer{index}" for index in range(layers)), (2, 4, 8), costs, weights, "trace")


def every(known):
    for columns in itertools.product(range(3), repeat=len(known.layers)):
        bits = torch.tensor([known.bits[column] for column in columns]).double()
        cost = known.costs[torch.arange(len(columns)), torch.tensor(columns)].double().sum().item()
        yield bits, cost


class TestAllocation:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("mean", [2.5, 4.0, 6.1])
    def test_size(self, seed, mean):
        known = table(seed=seed)
        weights = known.weights.double()
        best = min(cost for bits, cost in every(known) if bits @ weights <= mean * weights.sum() * (1 + 1e-9))
        found = allocate_bits(known, mean_bits=mean)
        assert found.cost == pytest.approx(best, rel=1e-6)
        assert found.size <= mean * float(weights.sum()) * (1 + 1e-9)

    def test_several_budgets(self):
        known, draws = table(), generator(9)
        weights = known.weights.double()
        counts = dict(zip(known.layers, torch.randint(100, 9000, (6,), generator=draws).tolist(), strict=True))
        macs = torch.tensor(list(counts.values())).double()
        seconds = torch.rand(6, 3, generator=draws).cumsum(1).double()
        most = 0.5 * float((macs * 64).sum())
        fits = []
        for bits, cost in every(known):
            columns = torch.tensor([known.bits.index(int(each)) for each in bits])
            time = seconds[torch.arange(6), columns].sum()
            if bits @ weights <= 5 * weights.sum() and macs @ bits.square() <= most and time <= 5.0:
                fits.append(cost)
        found = allocate_bits(known, mean_bits=5, operations=(counts, most), latency=(seconds.float(), 5.0))
        assert found.cost == pytest.approx(min(fits), rel=1e-6)
        loose = allocate_bits(known, operations=(counts, most), activation_bits=2)
        assert loose.cost <= found.cost

    def test_applies(self):
        model = network()
        known = layer_sensitivity(model, [batch()[0]], method="divergence")
        found = allocate_bits(known, mean_bits=4)
        mixed = quantize(model, Uniform(8), overrides=found.overrides())
        assert {path: mixed.get_submodule(path).weight_quantizer.code_bits() for path in known.layers} == found.bits

    def test_pareto_front(self):
        known = table()
        weights = known.weights.double()
        points = sorted(((bits @ weights).item(), cost) for bits, cost in every(known))
        best, least = [], math.inf
        for size, cost in points:
            if cost < least:
                best.append((size, cost))
                least = cost
        front = pareto_front(known, resolution=10_000_000)
        assert [each.size for each in front] == pytest.approx([size for size, _ in best])
        assert [each.cost for each in front] == pytest.approx([cost for _, cost in best])
        coarse = pareto_front(known, resolution=50)
        assert len(coarse) <= 51
        costs = [each.cost for each in coarse]
        assert costs == sorted(costs, reverse=True)
        assert front[0].size == 2 * float(weights.sum())

    def test_evolution(self):
        known = table()
        exact = allocate_bits(known, mean_bits=4)
        negative = {
            path: dict(zip(known.bits, row, strict=True))
            for path, row in zip(known.layers, (-known.costs).tolist(), strict=True)
        }

        def score(bits):
            return sum(negative[path][each] for path, each in bits.items())

        found = evolve_bits(known, score, mean_bits=4)
        assert found.cost == pytest.approx(exact.cost)
        odd = evolve_bits(known, lambda bits: -score(bits), mean_bits=4, generations=5)
        assert odd.size <= 4 * float(known.weights.sum())
        assert odd == evolve_bits(known, lambda bits: -score(bits), mean_bits=4, generations=5)

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({}, "budget"),
            ({"mean_bits": 1.5}, "mean_bits"),
            ({"operations": ({"layer0": 3}, 10.0)}, "layer1"),
            ({"latency": (torch.ones(2, 2), 1.0)}, "latency"),
        ],
    )
    def test_bad_input(self, keywords, message):
        with pytest.raises(InputError, match=message):
            allocate_bits(table(), **keywords)


class TestSearchedBits:
    def model(self):
        draws = generator(1)
        candidates = SearchedBits(tuple(map(channelwise, (2, 4, 8))), temperature=2.0)
        return quantize(network(), candidates, generator=draws)

    def test_mixture_and_choice(self):
        model = self.model()
        quantizer, weight = model[0].weight_quantizer, model[0].layer.weight
        quantizer.scores.data.copy_(torch.tensor([0.0, 30.0, 0.0]))
        assert torch.equal(quantizer.eval()(weight), quantizer.quantizers[1](weight))
        quantizer.temperature = 0.1
        torch.testing.assert_close(quantizer.train()(weight), quantizer.quantizers[1](weight))
        quantizer.temperature = 1e6
        average = torch.stack([each(weight) for each in quantizer.quantizers]).mean(0)
        torch.testing.assert_close(quantizer(weight), average, atol=1e-4, rtol=1e-3)
        assert freeze_quantizers(model)[0].weight_quantizer.code_bits() == 4

    def test_expected_bits(self):
        model = self.model()
        model[0].weight_quantizer.scores.data.copy_(torch.tensor([30.0, 0.0, 0.0]))
        found = expected_bits(model)
        torch.testing.assert_close(found, torch.tensor((30 * 2 + 36 * 14 / 3) / 66))
        found.backward()
        slope = model[2].weight_quantizer.scores.grad
        assert slope[0] < 0 < slope[2]
        with pytest.raises(InputError, match="SearchedBits"):
            expected_bits(network())

    def test_learns_that_bits_cost(self):
        model, rows = self.model().train(), batch()
        optimizer = torch.optim.Adam(
            [layer.weight_quantizer.scores for layer in model if hasattr(layer, "layer")], lr=0.1
        )
        for _ in range(60):
            optimizer.zero_grad()
            (1e-3 * loss(model, rows) + expected_bits(model)).backward()
            optimizer.step()
        assert all(layer.weight_quantizer.code_bits() == 2 for layer in model if hasattr(layer, "layer"))
        with pytest.raises(InputError, match="schemes"):
            SearchedBits((Uniform(4),))
