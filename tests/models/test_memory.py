"""The end-to-end memory network against its equations, written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from etude import data, models
from etude.core.checks import InputError
from etude.core.replicas import Replicas
from etude.core.training import fit, measure


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0, **settings):
    return models.MemoryNetwork(9, 5, generator(seed), **{"width": 4, "hops": 2, **settings})


def some_stories(rows=3):
    sentences = torch.randint(1, 9, (rows, 6, 3), generator=generator(9))
    sentences[0, 0] = 0  # an empty memory
    sentences[1, 2, 2] = 0  # a shorter sentence
    return sentences


def written_out(net, story):
    """Equations 1-4 and section 4.1 for one story, word by word."""
    width = net.words[0].shape[1]

    def embed(sentence, table):
        total = torch.zeros(width, dtype=torch.float64)
        for j, word in enumerate(sentence.tolist(), start=1):
            if word == 0:
                continue
            weight = torch.ones(width, dtype=torch.float64)
            if net.encoding == "position":
                for k in range(1, width + 1):
                    weight[k - 1] = 1 + 4 * (k - (width + 1) / 2) * (j - (len(sentence) + 1) / 2) / width / len(
                        sentence
                    )
            total = total + weight * table[word - 1]
        return total

    def memory(index, sentence, age):
        empty = not sentence.any()
        return embed(sentence, net.words[index]) + (0 if empty else net.ages[index][age])

    told, adjacent = story[:-1], net.tying == "adjacent"
    query = embed(story[-1], net.words[0 if adjacent else 2])
    for hop in range(net.hops):
        key, value = (hop, hop + 1) if adjacent else (0, 1)
        keys = [memory(key, sentence, len(told) - 1 - i) for i, sentence in enumerate(told)]
        values = [memory(value, sentence, len(told) - 1 - i) for i, sentence in enumerate(told)]
        scores = torch.stack([m @ query for m in keys])
        weights = scores.softmax(0) if net.attention == "softmax" else scores
        read = sum(p * c for p, c in zip(weights, values, strict=True))
        query = (query if adjacent else net.between @ query) + read
    return torch.cat([query.new_zeros(1), net.words[-1] @ query])


@pytest.mark.parametrize("tying", ["adjacent", "layer"])
@pytest.mark.parametrize("encoding", ["position", "bag"])
@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_it_is_the_paper_written_out(tying, encoding, attention):
    net = network(tying=tying, encoding=encoding, attention=attention, hops=3).double()
    with torch.no_grad():
        for value in net.parameters():
            value.mul_(8)  # initial weights are so small that attention would be all but even
    x = some_stories()
    torch.testing.assert_close(net(x), torch.stack([written_out(net, story) for story in x]))


def test_the_tables_are_those_of_the_paper():
    assert [len(network(tying=t, hops=3).words) for t in ("adjacent", "layer")] == [4, 4]
    assert [len(network(tying=t, hops=3).ages) for t in ("adjacent", "layer")] == [4, 2]
    values = torch.cat([p.flatten() for p in models.MemoryNetwork(500, 50, generator()).parameters()])
    assert values.std().item() == pytest.approx(0.1, rel=0.02)


def test_linear_attention_is_switched_off_by_its_attribute():
    net, x = network(attention="linear"), some_stories()
    assert not torch.allclose(net(x), network()(x), rtol=1e-3)
    net.attention = "softmax"
    assert torch.equal(net(x), network()(x))


def test_gradients():
    net = network().double()
    names = [name for name, _ in net.named_parameters()]
    values = [value.detach().requires_grad_() for value in net.parameters()]

    def scores(*changed):
        return functional_call(net, dict(zip(names, changed, strict=True)), (some_stories(),))

    assert torch.autograd.gradcheck(scores, values)
    assert scores(*values).dtype is torch.float64


def test_time_noise_draws_ages_as_if_blanks_had_been_said():
    net = network(time_noise=0.5)
    assert net.blanks == 3
    told = some_stories(2000)[:, :-1]
    ages = net.train()._ages(told)
    assert (ages.diff(dim=1) < 0).all()
    assert ages.min() == 0
    assert ages.max() == 5 + 3 - 1
    # With 0 blanks (a quarter of the stories) the first statement has age 4; blanks only add to it.
    assert (ages[:, 0] >= 4).all()
    assert 0.25 < (ages[:, 0] == 4).float().mean() < 0.75
    assert torch.equal(net.eval()._ages(told), torch.arange(4, -1, -1).expand(2000, 5))


def test_dropout_acts_in_training_alone():
    net, x = network(dropout=0.5), some_stories()
    assert torch.equal(net.eval()(x), network()(x))
    assert not torch.equal(net.train()(x), network()(x))


def test_blanks_in_front_of_a_short_story_change_linear_attention_not_at_all():
    net, x = network(attention="linear"), some_stories()[1:]
    padded = torch.cat([torch.zeros_like(x[:, :2]), x[:, 2:]], 1)
    torch.testing.assert_close(net(padded), net(x[:, 2:]))


@pytest.mark.parametrize("settings", [{}, {"time_noise": 0.2, "dropout": 0.2}])
def test_replicas(settings):
    nets, x = [network(seed, **settings) for seed in range(3)], some_stories()
    stacked = Replicas(nets)
    assert stacked(x).shape == (3, 3, 9)
    stacked.eval()
    torch.testing.assert_close(stacked(x), torch.stack([net.eval()(x) for net in nets]))
    own = torch.stack([x, x.flip(0), x])
    torch.testing.assert_close(
        stacked(own, batches=True), torch.stack([net(batch) for net, batch in zip(nets, own, strict=True)])
    )


def test_seeds_state_and_copies():
    net, x = network(), some_stories()
    assert torch.equal(net(x), network()(x))
    assert not torch.equal(net(x), network(1)(x))
    other = network(1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_it_learns_to_answer():
    told = data.tell_stories(2000, generator(), facts=1, statements=5)
    net = models.MemoryNetwork(len(told.vocabulary), 5, generator(), hops=1)

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum")

    fit(
        net,
        told.sentences,
        told.answers,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
        steps=400,
        batch_size=32,
        generator=generator(),
        loss=loss,
        before_step=lambda step: nn.utils.clip_grad_norm_(net.parameters(), 40.0),
    )
    unseen = data.tell_stories(500, generator(1), facts=1, statements=5)
    assert measure(net, unseen.sentences, unseen.answers)[1] > 0.95


def test_unusable_input():
    for settings, message in [
        ({"hops": 0}, "hops"),
        ({"width": 0}, "width"),
        ({"tying": "adjacnt"}, "did you mean 'adjacent'"),
        ({"encoding": "positions"}, "did you mean 'position'"),
        ({"attention": "hard"}, "attention"),
        ({"time_noise": 1.0}, "time_noise"),
        ({"dropout": 1.0}, "dropout"),
    ]:
        with pytest.raises(InputError, match=message):
            network(**settings)
    with pytest.raises(InputError, match="vocabulary"):
        models.MemoryNetwork(1, 5, generator())
    with pytest.raises(InputError, match="1 to 5 statements"):
        network()(torch.ones(2, 7, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="1 to 5 statements"):
        network()(torch.ones(2, 1, 3, dtype=torch.int64))
