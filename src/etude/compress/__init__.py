"""Make a network smaller."""

from etude._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    names={"prune": ["Masks", "Ticket", "lottery_ticket", "magnitude_prune", "prunable", "random_masks_like"]},
)
