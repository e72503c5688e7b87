"""etude: published results on neural networks as methods for your own PyTorch model, with their evidence.

Sub-packages load on first use, so ``import etude`` costs next to nothing:

>>> import etude
>>> sorted(etude.__all__)
['compare', 'compress', 'core', 'data', 'lab', 'merge', 'models', 'train']
"""

from etude._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__, modules=["compare", "compress", "core", "data", "lab", "merge", "models", "train"]
)
