"""Make one network of several."""

from etude._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    names={
        "alignment": ["Exact", "GroundCost", "Sinkhorn", "align"],
        "averaging": ["Ensemble", "average"],
        "concatenation": ["Concatenation", "Trunk", "concatenate", "new_head", "two_stage"],
        "distillation": ["Distillation", "distill"],
        "episodes": ["CosineHead", "Episodes", "few_shot"],
        "fusion": ["Fusion", "fuse"],
        "members": ["Snapshots", "train_members"],
        "redundancy": ["overlap"],
        "probing": ["LinearHead", "evaluate_by_environment", "invariant_probe", "probe", "ridge_path"],
        "rebasin": ["match_weights"],
    },
)
