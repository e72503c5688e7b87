"""The engine's context for tests of a single measurement, without an engine."""

import torch


class InMemory:
    """A context that keeps artifacts for the test."""

    device = torch.device("cpu")
    scratch = None

    def __init__(self):
        self.kept = {}

    def artifact(self, name, make):
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def progress(self, fraction, **metrics):
        assert 0 <= fraction <= 1
