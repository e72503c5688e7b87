"""The small transformers: shapes, causality, agreement with torch's own attention, and that they learn."""

import copy

import pytest
import torch
from torch import nn

from etude.core.checks import InputError
from etude.core.replicas import Replicas
from etude.core.sites import capture, sites
from etude.models import Decoder, VisionTransformer
from etude.models.transformer import Attention


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vision(**options):
    settings = {"size": 8, "patch": 4, "channels": 1, "dim": 16, "depth": 2, "heads": 2}
    return VisionTransformer(generator(), **(settings | options))


def decoder(**options):
    return Decoder(generator(), **({"vocabulary": 7, "length": 12, "dim": 16, "depth": 2, "heads": 2} | options))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs(causal):
    ours = Attention(12, 3, causal=causal)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    x = torch.randn(2, 5, 12, generator=generator())
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1) if causal else None
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_a_decoder_sees_no_future():
    network = decoder()
    tokens = torch.randint(7, (3, 10), generator=generator())
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 7
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6] - after[:, 6]).abs().max() > 1e-4


def test_embeddings_stay_tied_through_copy_and_storage():
    network = decoder()
    copied = copy.deepcopy(network)
    assert copied.predict.weight is copied.tokens.weight
    other = decoder(dropout=0.1).eval()
    other.load_state_dict(network.state_dict())
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    torch.testing.assert_close(other(tokens), network(tokens))


def test_seeds_decide():
    pairs = zip(vision().state_dict().values(), vision().state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = VisionTransformer(generator(1), size=8, patch=4, channels=1, dim=16, depth=2, heads=2)
    assert not torch.equal(other.patches.weight, vision().patches.weight)


def test_a_vision_transformer_sees_every_patch_in_its_place():
    network = vision().double()
    image = torch.randn(1, 1, 8, 8, generator=generator(), dtype=torch.float64)
    swapped = torch.cat([image[..., 4:], image[..., :4]], dim=-1)
    assert (network(image) - network(swapped)).abs().max() > 1e-9
    image.requires_grad_()
    network(image).square().sum().backward()
    assert (image.grad != 0).all()


@pytest.mark.parametrize("kind", ["vision", "decoder"])
def test_they_learn(kind):
    if kind == "vision":
        network, inputs = vision(), torch.randn(8, 1, 8, 8, generator=generator())
        targets = torch.arange(8)
    else:
        network, inputs = decoder(), torch.randint(7, (4, 9), generator=generator())
        targets = inputs.roll(-1, dims=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        scores = network(inputs)
        loss = nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_sites_and_replicas_reach_into_them():
    network = vision()
    assert sites(network, "blocks.*.attention") == ["blocks.0.attention", "blocks.1.attention"]
    x = torch.randn(3, 1, 8, 8, generator=generator())
    with capture(network, "blocks.*") as activations:
        network(x)
    assert activations["blocks.1"].shape == (3, 5, 16)
    torch.testing.assert_close(Replicas([network, vision()])(x)[1], network(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vision(heads=3), "heads: got 3 for width 16"),
        (lambda: vision(patch=3), "patch"),
        (lambda: vision(depth=0), "depth"),
        (lambda: vision(dropout=1.0), "dropout"),
        (lambda: decoder(vocabulary=0), "vocabulary"),
        (lambda: decoder()(torch.zeros(1, 13, dtype=torch.int64)), "at most 12"),
    ],
)
def test_unusable_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()
