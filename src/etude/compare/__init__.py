"""Compare networks with each other."""

from etude._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    names={
        "clustering": ["UnitClusters", "cluster_units"],
        "convergent": [
            "Convergence",
            "PairFindings",
            "UnitMatching",
            "convergence",
            "match_units",
            "rotated",
        ],
        "information": ["mutual_information"],
        "mapping": ["MappingPath", "sparse_mapping"],
        "matching": ["Matching", "match"],
        "statistics": ["UnitStatistics", "unit_samples", "unit_statistics"],
    },
)
