"""Gradient noise against the usual Python loops, and what it adds to a training step."""

import os
from collections.abc import Callable, Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from scipy import stats
from side_by_side import Comparison, compare, write
from torch import Tensor, nn

from etude.train import GradientNoise

STD = 0.1
TENSORS, PARAMETERS, ROWS = 300, 100_000_000, 32


def main() -> None:
    found = []
    for threads in dict.fromkeys((1, os.cpu_count() or 1)):
        torch.set_num_threads(threads)
        found += [*against_loops(), share_of_a_step(100, 25), share_of_a_step(814, 5)]
    write("gradient_noise", found)


def against_loops() -> Iterator[Comparison]:
    """The noise alone, on the gradients of 100 million parameters in 300 tensors of one size."""
    weights = [nn.Parameter(torch.zeros(PARAMETERS // TENSORS)) for _ in range(TENSORS)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in weights]
    noise = GradientNoise(torch.optim.SGD(weights, lr=0.0), std=STD)

    def ours() -> None:
        noise._add(gradients, STD)

    def loop() -> None:
        for weight in weights:
            weight.grad += STD * torch.randn_like(weight.grad)

    def loop_over_sizes() -> None:  # as the speech toolkits have it
        for weight in weights:
            weight.grad += torch.randn(weight.grad.size()).to(weight.device) * STD

    agreement = agree(gradients[0], ours, loop)
    work = f"noise on 100 million gradients in 300 tensors, threads: {torch.get_num_threads()}"
    yield compare(work, "p.grad += std * randn_like(p.grad)", ours, loop, aim=0.6, agreement=agreement)
    yield compare(work, "p.grad += randn(p.grad.size()) * std", ours, loop_over_sizes, aim=0.6, agreement=agreement)


def agree(gradient: Tensor, *ways: Callable[[], None]) -> str:
    """How probable the variance of each way's draws is by the chi-square law, and that both are of one law."""
    drawn, probabilities = [], []
    for way in ways:
        gradient.zero_()
        way()
        drawn.append(gradient.double() / STD)
        below = float(stats.chi2.cdf(drawn[-1].square().sum().item(), len(gradient)))
        probabilities.append(2 * min(below, 1 - below))
    same = stats.ks_2samp(*(values.numpy() for values in drawn)).pvalue
    return (
        f"{len(gradient)} draws each: chi-square p = {probabilities[0]:.2f} and {probabilities[1]:.2f}, "
        f"two-sample Kolmogorov-Smirnov p = {same:.2f}"
    )


def share_of_a_step(width: int, repeats: int) -> Comparison:
    """A whole step of Adam, with noise and without, of a plain network of 300 tensors."""
    layers = chain.from_iterable((nn.Linear(width, width), nn.ReLU()) for _ in range(TENSORS // 2))
    network = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    level = 0.0
    GradientNoise(optimizer, schedule=lambda step: level)
    inputs, targets = torch.randn(ROWS, width), torch.arange(ROWS) % width

    def step(std: float) -> None:
        nonlocal level
        level = std
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()

    millions = sum(value.numel() for value in network.parameters()) / 1e6
    work = f"Adam step with noise, {millions:.1f} million parameters, {ROWS} rows, threads: {torch.get_num_threads()}"
    return compare(work, "the step without noise", lambda: step(STD), lambda: step(0.0), repeats=repeats, aim=1.03)


if __name__ == "__main__":
    main()
