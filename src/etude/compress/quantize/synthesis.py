r"""Data without data: inputs made up from what batch norms remember, to calibrate, measure or fine-tune on.

`synthesize` optimises noise until its statistics at every batch norm are those of the training data (ZeroQ);
`GenerativeData` trains a generator that also knows classes (GDFQ). Neither needs a label or an image.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from etude.compress.quantize.post_training import FoldedNorm
from etude.core.checks import InputError, check_at_least
from etude.core.modes import evaluating

__all__ = ["GenerativeData", "ImageGenerator", "statistics_loss", "synthesize"]

Norm = nn.modules.batchnorm._BatchNorm


@contextmanager
def statistics_loss(model: nn.Module) -> Iterator[list[Tensor]]:
    r"""While the block runs, each forward leaves in the list how far its batch is from what batch norms remember.

    For each norm (folded ones too) :math:`\frac1C (\|\mu(x) - \mu_{BN}\|^2 + \|\sigma(x) - \sigma_{BN}\|^2)` over its C
    channels. The list is emptied before each forward; sum it up for the loss.

    Raises:
        InputError: if the model has no batch norm with running statistics.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    >>> with statistics_loss(model) as losses:
    ...     _ = model(torch.randn(8, 3))
    >>> len(losses), bool(losses[0] > 0)
    (1, True)
    """
    norms = _norms(model)
    if not norms:
        raise InputError(
            "has no batch norm with running statistics", where="model", instead="calibrate on data of your own"
        )
    losses: list[Tensor] = []

    def restart(module: nn.Module, args: Any) -> None:
        if module is model:
            losses.clear()

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        losses.append(_distance(args[0], 1, *_remembered(module)))

    handles = [model.register_forward_pre_hook(restart)]
    handles += [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()


def _norms(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if isinstance(module, FoldedNorm) or (isinstance(module, Norm) and module.running_mean is not None)
    ]


def _remembered(norm: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what enters a norm (of a folded one: of what its layer gives)."""
    if isinstance(norm, FoldedNorm):
        return norm.mean, norm.std
    return norm.running_mean, (norm.running_var + norm.eps).sqrt()


def _distance(x: Tensor, axis: int, mean: Tensor, deviation: Tensor) -> Tensor:
    table = x.movedim(axis, 0).flatten(1)
    own = (table.var(1, unbiased=False) + 1e-10).sqrt()
    return (table.mean(1) - mean).square().mean() + (own - deviation).square().mean()


def synthesize(
    model: nn.Module,
    shape: Sequence[int],
    count: int,
    *,
    steps: int = 500,
    rate: float = 0.1,
    batch_size: int = 64,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "count *shape"]:
    """Inputs whose statistics at every batch norm match its running ones, from Gaussian noise: ZeroQ's distilled data.

    Args:
        model: a float model with batch norms (or folded ones), which it stays as it is.
        shape: of one input, e.g. ``(3, 32, 32)``.
        count: inputs to make.
        steps: of Adam, for each batch; 500 in the paper's code.
        rate: Adam's; lowered to a tenth whenever 100 steps bring nothing, as in the paper's code.
        batch_size: inputs whose statistics are matched together.
        mean: of the real inputs, one for each channel or for all; matched too.
        std: likewise, their standard deviation.
        generator: CPU generator of the noise; seed 0 if not given.

    Raises:
        InputError: if the model has no batch norm with running statistics.

    Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework, CVPR 2020.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> synthesize(model, (3, 8, 8), 4, steps=2).shape
    torch.Size([4, 3, 8, 8])
    """
    check_at_least("count", count, 1)
    check_at_least("steps", steps, 0)
    check_at_least("rate", rate, 0.0, strict=True)
    check_at_least("batch_size", batch_size, 2)
    draws = torch.Generator().manual_seed(0) if generator is None else generator
    like = next(model.parameters())
    targets = [torch.as_tensor(each, dtype=like.dtype, device=like.device).expand(shape[0]) for each in (mean, std)]
    network = copy.deepcopy(model).requires_grad_(False).eval()
    made = []
    for start in range(0, count, batch_size):
        noise = torch.randn(min(batch_size, count - start), *shape, generator=draws).to(like)
        made.append(_distilled(network, noise, targets, steps, rate))
    return torch.cat(made)


def _distilled(network: nn.Module, noise: Tensor, targets: list[Tensor], steps: int, rate: float) -> Tensor:
    x = _spread(noise, *targets).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100, min_lr=min(1e-4, rate))
    with statistics_loss(network) as losses, torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            network(x)
            loss = torch.stack(losses).sum() + _distance(x, 1, *targets)
            loss.backward()
            optimizer.step()
            plateau.step(float(loss.detach()))
    return x.detach()


def _spread(noise: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    shape = (-1, *[1] * (noise.dim() - 2))
    return noise * std.view(shape) + mean.view(shape)


class ImageGenerator(nn.Module):
    """GDFQ's generator: images from noise and a class.

    The class's embedding is multiplied with the noise; two upsampling stages of convolutions follow.

    Args:
        shape: (channels, height, width) of an image; height and width divisible by 4.
        classes: number of them.
        latent: dimensions of the noise; 100 in the paper.
        width: channels of the first stage; 128 in the paper.

    >>> ImageGenerator((3, 32, 32), 10)(torch.randn(2, 100), torch.tensor([3, 7])).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, shape: Sequence[int], classes: int, *, latent: int = 100, width: int = 128):
        super().__init__()
        channels, height, across = shape
        if height % 4 or across % 4:
            raise InputError(f"got {height} x {across}", where="shape", instead="give multiples of 4")
        check_at_least("width", width, 2)
        self.latent, self.classes, self.start = latent, classes, (width, height // 4, across // 4)
        self.embedding = nn.Embedding(classes, latent)
        self.project = nn.Linear(latent, width * self.start[1] * self.start[2])
        self.stages = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width, 0.8),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2, 0.8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(
        self, noise: Float[Tensor, "batch latent"], labels: Int64[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images, about standardised."""
        return self.stages(self.project(noise * self.embedding(labels)).unflatten(1, self.start))


class GenerativeData:
    r"""A source of made-up labelled inputs that learns what the float model thinks classes look like: GDFQ.

    Each `step` trains the generator by :math:`CE(M(G(z|y)), y) + \beta\, L_{BNS}`, with the statistics loss of
    `statistics_loss`, and gives a batch. Fine-tune the quantised model on it in your own loop, with `Distillation`
    from the float model::

        inputs, labels = data.step(64)
        loss = distillation(quantized(inputs), model(inputs), labels)

    Args:
        model: the float model, with batch norms; stays as it is.
        network: the generator, e.g. `ImageGenerator`: a module of noise and labels with attributes ``latent`` and
            ``classes``, the width of the noise and the number of classes.
        strength: beta; 0.1 in the paper.
        rate: Adam's; 1e-3 in the paper.
        generator: CPU generator of noise and labels; seed 0 if not given.

    Xu et al., Generative Low-bitwidth Data Free Quantization, ECCV 2020.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> data = GenerativeData(model, ImageGenerator((1, 8, 8), 2, latent=8, width=4))
    >>> inputs, labels = data.step(16)
    >>> inputs.shape, labels.shape
    (torch.Size([16, 1, 8, 8]), torch.Size([16]))
    """

    def __init__(
        self,
        model: nn.Module,
        network: Any,
        *,
        strength: float = 0.1,
        rate: float = 1e-3,
        generator: torch.Generator | None = None,
    ):
        check_at_least("strength", strength, 0.0)
        check_at_least("rate", rate, 0.0, strict=True)
        if not _norms(model):
            raise InputError("has no batch norm with running statistics", where="model")
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.network, self.strength = network, strength
        self.optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.5, 0.999))
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def step(self, count: int) -> tuple[Tensor, Tensor]:
        """Train the generator on one batch, and give that batch: inputs without a graph, and labels."""
        check_at_least("count", count, 2)
        self.network.train()
        inputs, labels = self._draw(count)
        with statistics_loss(self.model) as losses:
            scores = self.model(inputs)
            loss = F.cross_entropy(scores, labels) + self.strength * torch.stack(losses).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return inputs.detach(), labels

    @torch.no_grad()
    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """A batch from the generator as it is."""
        check_at_least("count", count, 1)
        with evaluating(self.network):
            return self._draw(count)

    def state_dict(self) -> dict[str, Any]:
        """The generator, its optimizer, and the state of the draws."""
        draws = self.generator.get_state()
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "draws": draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["draws"])

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        like = next(self.network.parameters())
        noise = torch.randn(count, self.network.latent, generator=self.generator).to(like)
        labels = torch.randint(self.network.classes, (count,), generator=self.generator).to(like.device)
        return self.network(noise, labels), labels
