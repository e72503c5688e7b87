"""Aids for the training loop."""

from etude._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__, names={"gradient_noise": ["AnnealedNoise", "ConstantNoise", "GradientNoise"]}
)
