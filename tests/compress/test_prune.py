"""Lottery tickets: the exact properties of masks, rounds and resets."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import prune as torch_prune

from etude.compress import Masks, lottery_ticket, magnitude_prune, prunable, random_masks_like
from etude.core.checks import InputError
from etude.core.params import bake_masks, bare_state, flatten, mask_parameters, unflatten


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(20)] if norm else []
    return nn.Sequential(nn.Linear(10, 20), *middle, nn.ReLU(), nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3))


DATA = torch.randn(60, 10, generator=generator())
TARGETS = (DATA[:, 0] > 0).long() + (DATA[:, 1] > 0).long()


def trainer(optimizer=torch.optim.Adam, steps=15, watch=None, **options):
    def train(model):
        stepper = optimizer(model.parameters(), **({"lr": 0.02} | options))
        if watch is not None:
            watch.append(bare_state(model))
        for _ in range(steps):
            stepper.zero_grad()
            nn.functional.cross_entropy(model(DATA), TARGETS).backward()
            stepper.step()
        return {"done": True}

    return train


def test_counts_follow_the_rate_exactly_and_masks_nest():
    tickets = lottery_ticket(network(), trainer(), rounds=5)
    for name, whole in tickets[0].masks.counts().items():
        rate = 0.1 if name == "4.weight" else 0.2
        left = whole
        for before, after in pairwise(tickets):
            left -= round(rate * left)
            assert after.masks.counts()[name] == left
            assert not (after.masks[name] & ~before.masks[name]).any()
    assert tickets[0].masks.remaining == 1


def test_every_round_starts_at_the_masked_initial_weights_bit_for_bit():
    model, seen = network(norm=True), []
    tickets = lottery_ticket(model, trainer(watch=seen), rounds=3)
    for ticket, start in zip(tickets, seen, strict=True):
        for name, value in bare_state(model).items():
            mask = ticket.masks.get(name)
            assert torch.equal(start[name], value if mask is None else value * mask), name


def test_rewinding_resets_to_the_rewound_point():
    seen = []
    tickets = lottery_ticket(network(), trainer(watch=seen), rounds=2, rewind=trainer(steps=3))
    reference = network()
    trainer(steps=3)(reference)
    assert torch.equal(seen[1]["0.weight"], reference[0].weight.detach() * tickets[1].masks["0.weight"])


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"weight_decay": 0.5}),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    ],
)
def test_pruned_weights_stay_zero_and_get_no_gradient(optimizer, options):
    model = network()
    masks = random_masks_like(magnitude_prune(dict(model.named_parameters()), Masks.ones(model), 0.5), generator())
    masked = masks.apply(model)
    trainer(optimizer, **options)(masked)
    assert (masked[0].weight[~masks["0.weight"]] == 0).all()
    assert (masked[0].weight[masks["0.weight"]] != model[0].weight[masks["0.weight"]]).all()
    gradient = masked[0].parametrizations.weight.original.grad
    assert (gradient[~masks["0.weight"]] == 0).all()
    assert gradient[masks["0.weight"]].abs().sum() > 0


def test_training_a_masked_network_is_training_the_smaller_network():
    masks = Masks({"0.weight": torch.zeros(20, 10, dtype=torch.bool)})
    masks["0.weight"][:, :4] = True
    masked = masks.apply(network())
    small = network()
    small[0] = nn.Linear(4, 20)
    small[0].load_state_dict({"weight": network()[0].weight[:, :4], "bias": network()[0].bias})
    whole = nn.Sequential(_First(4), *small)
    trainer()(masked), trainer()(whole)
    torch.testing.assert_close(masked[0].weight[:, :4], whole[1].weight, atol=1e-6, rtol=1e-5)


class _First(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        return x[:, : self.count]


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_largest_survive_as_torch_prunes(count, fraction, seed):
    weights = torch.randn(count, generator=generator(seed))
    masks = Masks({"weight": torch.ones(count, dtype=torch.bool)})
    ours = magnitude_prune({"weight": weights}, masks, fraction, output_factor=1)["weight"]
    layer = nn.Module()
    layer.weight = nn.Parameter(weights.clone())
    theirs = torch_prune.l1_unstructured(layer, "weight", round(fraction * count)).weight_mask.bool()
    assert torch.equal(ours, theirs)


def test_global_scope_agrees_with_torch_and_ignores_layer_order():
    model = network()
    weights = dict(model.named_parameters())
    ours = magnitude_prune(weights, Masks.ones(model), 0.5, scope="global")
    backwards = magnitude_prune(weights, Masks.ones(model, prunable(model)[::-1]), 0.5, scope="global")
    reference = copy.deepcopy(model)
    layers = [(module, "weight") for module in reference if isinstance(module, nn.Linear)]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.5)
    for index in (0, 2, 4):
        assert torch.equal(ours[f"{index}.weight"], reference[index].weight_mask.bool())
        assert torch.equal(ours[f"{index}.weight"], backwards[f"{index}.weight"])


def test_layer_scope_ignores_a_layers_scale_and_global_does_not():
    model = network()
    weights = {name: value.detach() for name, value in model.named_parameters()}
    scaled = weights | {"0.weight": weights["0.weight"] * 100}
    for scope, same in (("layer", True), ("global", False)):
        first = magnitude_prune(weights, Masks.ones(model), 0.3, scope=scope)
        second = magnitude_prune(scaled, Masks.ones(model), 0.3, scope=scope)
        assert all(torch.equal(first[n], second[n]) for n in first) is same


def test_ties_go_by_index_and_the_dead_are_no_candidates():
    mask = torch.tensor([False, True, True, True, True])
    weights = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])
    left = magnitude_prune({"w": weights}, Masks({"w": mask}), 0.25, output_factor=1)["w"]
    assert left.tolist() == [False, False, True, True, True]


def test_a_mask_of_ones_changes_nothing():
    plain, masked = network(), Masks.ones(network()).apply(network())
    trainer()(plain), trainer()(masked)
    for name, value in bare_state(masked).items():
        assert torch.equal(value, plain.state_dict()[name])


def test_the_model_given_is_untouched_and_seeds_decide():
    model = network(norm=True)
    before = copy.deepcopy(model.state_dict())
    first, second = (lottery_ticket(model, trainer(), rounds=2) for _ in range(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(first[-1].masks[name], second[-1].masks[name]) for name in first[-1].masks)


def test_continuing_never_resets():
    seen = []
    tickets = lottery_ticket(network(), trainer(watch=seen), rounds=2, strategy="continue")
    expected = tickets[0].trained["0.weight"] * tickets[1].masks["0.weight"]
    assert torch.equal(seen[1]["0.weight"], expected)
    assert torch.equal(tickets[1].instantiate()[0].weight, network()[0].weight * tickets[1].masks["0.weight"])


def test_starts_of_an_instantiated_ticket():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 5))
    with torch.no_grad():
        model[0].weight.normal_(0, 0.1)
    ticket = lottery_ticket(model, lambda m: m[0].parametrizations.weight.original.data.mul_(1.5).sum(), rounds=1)[-1]
    mask, origin = ticket.masks["0.weight"], model[0].weight.detach()
    values = {
        start: ticket.instantiate(start, generator=generator())[0].weight.detach()[mask]
        for start in ("original", "reinit", "survivors", "sign", "noise")
    }
    assert torch.equal(values["original"], origin[mask])
    assert abs(values["reinit"].std() / 0.1 - 1) < 0.02 + (1 - mask.float().mean())
    assert set(values["survivors"].tolist()) <= set(origin[mask].tolist())
    assert torch.equal(values["sign"].sign(), origin[mask].sign())
    assert abs((values["noise"] - origin[mask]).std() / 0.05 - 1) < 0.05
    again = ticket.instantiate("reinit", generator=generator())[0].weight[mask]
    assert torch.equal(again, values["reinit"])
    with pytest.raises(InputError, match="generator"):
        ticket.instantiate("reinit")
    with pytest.raises(InputError, match="did you mean 'original'"):
        ticket.instantiate("orginal")


def test_a_planted_ticket_is_found():
    torch.manual_seed(0)
    support = torch.rand(20, 30) < 0.05
    teacher = torch.where(support, torch.randn(20, 30).sign() * 2, torch.zeros(()))
    student = nn.Linear(30, 20, bias=False)
    with torch.no_grad():
        student.weight.copy_(teacher + 0.05 * torch.randn(20, 30))
    inputs = torch.randn(256, 30)

    def train(model):
        stepper = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(30):
            stepper.zero_grad()
            nn.functional.mse_loss(model(inputs), inputs @ teacher.T).backward()
            stepper.step()
        return 1

    found = lottery_ticket(student, train, rounds=13, output_factor=1)[-1].masks
    random = random_masks_like(found, generator())["weight"]
    assert (found["weight"] & support).sum() >= 0.8 * support.sum()
    assert (random & support).sum() < 0.3 * support.sum()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_random_masks_and_degrees_and_sparse_weights():
    ticket = lottery_ticket(network(), trainer(), rounds=3)[-1]
    assert random_masks_like(ticket.masks, generator()).counts() == ticket.masks.counts()
    inputs, outputs = ticket.masks.degrees("0.weight")
    assert inputs.sum() == outputs.sum() == ticket.masks.counts()["0.weight"]
    sparse = ticket.to_sparse()["0.weight"]
    assert torch.equal(sparse.to_dense(), ticket.trained["0.weight"])
    moved, outward = ticket.movement("0.weight")
    assert len(moved) == len(outward) == ticket.masks.counts()["0.weight"]


def test_masks_and_masked_networks_survive_storage_and_copying():
    ticket = lottery_ticket(network(norm=True), trainer(), rounds=2)[-1]
    stored = Masks(load(save(ticket.masks.state_dict())))
    assert all(torch.equal(stored[name], mask) for name, mask in ticket.masks.items())
    masked = ticket.instantiate()
    other = Masks.ones(network(norm=True)).apply(network(norm=True))
    other.load_state_dict(load(save(masked.state_dict())))
    masked.eval(), other.eval()
    assert torch.equal(other(DATA), masked(DATA))
    assert torch.equal(copy.deepcopy(masked)(DATA), masked(DATA))
    plain = bake_masks(masked)
    assert plain.state_dict().keys() == network(norm=True).state_dict().keys()
    assert torch.equal(plain(DATA), masked(DATA))


def test_gradients_agree_with_finite_differences():
    masked = random_masks_like(
        magnitude_prune(dict(network().named_parameters()), Masks.ones(network()), 0.5), generator()
    ).apply(network()).double()  # fmt: skip
    weight = masked[0].parametrizations.weight.original

    def loss(values):
        with torch.no_grad():
            kept = weight.clone()
        return torch.func.functional_call(
            masked, {"0.parametrizations.weight.original": values + 0 * kept}, (DATA[:3].double(),)
        ).sum()

    torch.autograd.gradcheck(loss, weight.detach().clone().requires_grad_())


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2"])
def test_hugging_face_models(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    if kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes))
        batch = {"pixel_values": torch.randn(2, 1, 8, 8)}
    elif kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=20, max_position_embeddings=8, **sizes))
        batch = {"input_ids": torch.randint(20, (2, 5))}
    else:
        settings_ = transformers.GPT2Config(
            vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(settings_)
        batch = {"input_ids": torch.randint(20, (2, 5))}
    names = prunable(model)
    assert names
    assert not any(
        "embed" in n or "wte" in n or "norm" in n.lower() or "lm_head" in n for n in names if "patch" not in n
    )

    def train(masked):
        stepper = torch.optim.SGD(masked.parameters(), lr=0.1)
        masked(**batch)[0].square().mean().backward()
        stepper.step()
        return 1

    ticket = lottery_ticket(model, train, rounds=2)[-1]
    assert 0.6 < ticket.masks.remaining < 0.7
    assert ticket.instantiate()(**batch)[0].isfinite().all()


def test_tied_weights_have_one_mask():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert prunable(model) == ["0.weight"]
    mask = torch.rand(4, 4, generator=generator()) > 0.5
    masked = mask_parameters(model, {"0.weight": mask})
    assert torch.equal(masked[0].weight, masked[1].weight)
    assert (masked[1].weight[~mask] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"rounds": 0}, "rounds"),
        ({"scope": "layers"}, "did you mean 'layer'"),
        ({"strategy": "resets"}, "did you mean 'reset'"),
        ({"rates": {"nothing.*": 0.1}}, "matches no pruned parameter"),
        ({"scope": "global", "rates": {"0.weight": 0.1}}, "can only be 0"),
        ({"fraction": 0.9, "rounds": 6}, r"layer '0.weight' would keep 0 of 200 weights.*scope='global'"),
    ],
)
def test_unusable_arguments_are_refused_before_training(arguments, message):
    calls = []
    with pytest.raises(InputError, match=message):
        lottery_ticket(network(), calls.append, **arguments)
    assert calls == []


def test_a_train_that_does_not_train_is_refused():
    with pytest.raises(InputError, match="returned None"):
        lottery_ticket(network(), lambda m: trainer()(m) and None)
    with pytest.raises(InputError, match="as they were"):
        lottery_ticket(network(), lambda m: trainer()(network()))
    with pytest.raises(InputError, match="structure"):
        lottery_ticket(network(), lambda m: m.append(nn.Linear(3, 3)))
    with pytest.raises(InputError, match="no weight matrix"):
        prunable(nn.BatchNorm1d(3))


def test_masks_are_checked():
    # The annotation is checked before the body where the tests' type checker runs.
    with pytest.raises(Exception, match=r"boolean|Bool"):
        Masks({"weight": torch.ones(2)})
    with pytest.raises(InputError, match="did you mean 'weight'"):
        Masks({"wieght": torch.ones(1, 2, dtype=torch.bool)}).apply(nn.Linear(2, 1))
    with pytest.raises(InputError, match="one entry for each weight"):
        Masks({"weight": torch.ones(2, dtype=torch.bool)}).apply(nn.Linear(2, 1))


def test_half_precision_masks_keep_the_dtype():
    masked = Masks.ones(network()).apply(network().bfloat16())
    assert masked[0].weight.dtype is torch.bfloat16


def test_flatten_and_unflatten_are_inverse():
    values = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    back = unflatten(flatten(values), values)
    assert all(torch.equal(back[name], value) for name, value in values.items())
    with pytest.raises(InputError, match="got 3 values for 10"):
        unflatten(torch.zeros(3), values)
