"""Distillation: the student imitates each teacher with one network's parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude.core.checks import InputError
from etude.core.replicas import Replicas
from etude.merge import Distillation, distill


def perceptron(seed: int, width: int = 16, *, classes: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))


ROWS = torch.randn(256, 5, generator=torch.Generator().manual_seed(0))
LABELS = (ROWS[:, 0] > 0).long() + (ROWS[:, 1] > 0.5).long()


def trained(seed: int) -> nn.Sequential:
    network = perceptron(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(network(ROWS), LABELS).backward()
        optimizer.step()
    return network.eval()


def distilled(teachers, heads="per_teacher", steps=400, **choices):
    return distill(
        perceptron(100),
        teachers,
        ROWS,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        steps=steps,
        batch_size=64,
        generator=torch.Generator().manual_seed(0),
        heads=heads,
        **choices,
    )


@pytest.mark.parametrize("heads", ["per_teacher", "joint"])
def test_a_student_of_copies_does_as_its_teacher_does(heads):
    teacher = trained(0)
    student = distilled([teacher, copy.deepcopy(teacher)], heads)
    loss, reached = (F.cross_entropy(network(ROWS), LABELS).item() for network in (teacher, student))
    assert reached < loss + 0.05
    assert (student(ROWS).argmax(1) == teacher(ROWS).argmax(1)).double().mean() > 0.97
    sizes = [sum(p.numel() for p in network.parameters()) for network in (student, perceptron(0))]
    assert sizes[0] == sizes[1]
    assert student.state_dict().keys() == teacher.state_dict().keys()


def test_heads_follow_their_own_teachers():
    teachers = [trained(seed) for seed in range(2)]
    with torch.no_grad():
        teachers[1][2].weight.copy_(teachers[1][2].weight.roll(1, 0))  # answers of its own
        teachers[1][2].bias.copy_(teachers[1][2].bias.roll(1, 0))
    distillation = Distillation(perceptron(9), teachers, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(distillation.trainable(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        distillation(ROWS).backward()
        optimizer.step()
    answers = distillation.heads(distillation.trunk(ROWS)).unflatten(1, (2, 3)).argmax(2)
    for index, teacher in enumerate(teachers):
        assert (answers[:, index] == teacher(ROWS).argmax(1)).double().mean() > 0.95
    assert (answers[:, 0] == answers[:, 1]).double().mean() < 0.1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_the_mean_divergence_from_each_teacher(temperature):
    teachers = [perceptron(0), perceptron(1)]
    distillation = Distillation(perceptron(2), teachers, temperature=temperature)
    outputs = distillation.heads(distillation.trunk(ROWS)).unflatten(1, (2, 3))
    expected = 0.0
    for index, teacher in enumerate(teachers):
        p = (teacher(ROWS) / temperature).softmax(1)
        q = (outputs[:, index] / temperature).softmax(1)
        expected += temperature**2 * (p * (p / q).log()).sum(1).mean() / 2
    torch.testing.assert_close(distillation(ROWS), expected)
    stacked = Distillation(perceptron(2), Replicas(teachers), temperature=temperature)
    stacked.heads.load_state_dict(distillation.heads.state_dict())
    torch.testing.assert_close(stacked(ROWS), distillation(ROWS))


def test_a_joint_head_imitates_the_mean_of_the_logits():
    teachers = [perceptron(0), perceptron(1)]
    distillation = Distillation(perceptron(2), teachers, heads="joint")
    p = ((teachers[0](ROWS) + teachers[1](ROWS)) / 2).softmax(1)
    q = distillation.heads(distillation.trunk(ROWS)).softmax(1)
    torch.testing.assert_close(distillation(ROWS), (p * (p / q).log()).sum(1).mean())


def test_features_are_regressed_in_units_of_their_variance():
    teachers = [trained(0), perceptron(1, classes=7)]  # their classes do not matter
    with torch.no_grad():
        teachers[0][0].weight[0] = 0.0  # a feature that is constant
        teachers[0][0].bias[0] = -1.0
    distillation = Distillation(perceptron(2), teachers, heads="features")
    before = distillation(ROWS).item()
    optimizer = torch.optim.Adam(distillation.trainable(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        distillation(ROWS).backward()
        optimizer.step()
    assert distillation(ROWS).item() < 0.3 < before
    assert distillation.heads.out_features == 32
    assert distillation.network()(ROWS).shape == (256, 3)


def test_teachers_and_student_given_are_left_alone_and_seeds_decide():
    teachers, student = [trained(0), trained(1)], perceptron(100)
    before = copy.deepcopy([network.state_dict() for network in (*teachers, student)])
    one, other = distilled(teachers, steps=20), distilled(teachers, steps=20)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    for network, state in zip((*teachers, student), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    distillation = Distillation(student, teachers)
    distillation(ROWS).backward()
    assert all(p.grad is None for p in distillation.teachers.parameters())
    assert all(p.grad is not None for p in distillation.trainable())
    assert not distillation.train().teachers.training


def test_batch_norm_of_teachers_stays_as_it_is():
    teacher = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    distillation = Distillation(perceptron(0), [teacher]).train()
    state = copy.deepcopy(distillation.teachers.state_dict())
    distillation(ROWS)
    assert all(torch.equal(value, state[name]) for name, value in distillation.teachers.state_dict().items())


def test_hugging_face_teachers_and_students():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        attn_implementation="eager",
    )
    teachers = [transformers.BertForSequenceClassification(config) for _ in range(2)]
    tokens = {"input_ids": torch.randint(20, (4, 5)), "attention_mask": torch.ones(4, 5, dtype=torch.long)}
    distillation = Distillation(transformers.BertForSequenceClassification(config), teachers, inputs=tokens)
    distillation(**tokens).backward()
    network = distillation.network()
    assert network(**tokens).logits.shape == (4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Distillation(perceptron(0), []), "teachers: got none"),
        (lambda: Distillation(perceptron(0), [perceptron(1)], heads="mean"), "heads: got 'mean'"),
        (lambda: Distillation(perceptron(0), [perceptron(1)], temperature=0.0), "temperature: got 0.0"),
        (lambda: Distillation(perceptron(0), [perceptron(1, classes=5)])(ROWS), "5 classes, the student has 3"),
        (
            lambda: Distillation(perceptron(0), [perceptron(1), perceptron(1, classes=5)])(ROWS),
            "teachers of equal classes",
        ),
        (lambda: distilled([perceptron(0)], steps=0), "steps: got 0"),
    ],
)
def test_unusable_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
