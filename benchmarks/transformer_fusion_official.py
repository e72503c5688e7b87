"""Transformer fusion against the authors' own code, run as published.

    python benchmarks/transformer_fusion_official.py CLONE PYTHON

``CLONE`` is a checkout of github.com/graldij/transformer-fusion, ``PYTHON`` an interpreter with what it needs
(transformers 4, POT 0.9, pyyaml). Both sides fuse two Hugging Face ViTs of the paper's size (width 384, patches of 4,
seven blocks) on 200 images with the published configuration, each in a process of its own on one core: time, and peak
memory above the start. Without arguments nothing is measured.
"""

import json
import subprocess
import sys

from side_by_side import Comparison, write

COMMON = """
import json, os, resource, sys, time
import torch
from transformers import ViTConfig, ViTForImageClassification
torch.set_num_threads(1)
os.get_terminal_size = lambda *_: os.terminal_size((80, 24))
config = ViTConfig(image_size=32, patch_size=4, hidden_size=384, num_hidden_layers=7, num_attention_heads=12,
                   intermediate_size=1536, num_labels=10)
models = []
for seed in (0, 1):
    torch.manual_seed(seed)
    models.append(ViTForImageClassification(config).eval())
    with torch.no_grad():
        for value in models[-1].parameters():
            value.add_(0.02 * torch.randn_like(value))
images = torch.rand(200, 3, 32, 32)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""
OURS = """
from etude.merge import Exact, Sinkhorn, fuse
solver = Exact() if sys.argv[1] == "emd" else Sinkhorn(0.08)
began = time.perf_counter()
fuse(models, {"pixel_values": images}, solver=solver, tokens=6, class_token="own")
"""
THEIRS = """
import logging, yaml
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/otfusion"]
from otfusion.hf_vit_fusion import hf_vit_fusion
from otfusion.utils import get_activations, model_to_dict
settings = yaml.safe_load(open(sys.argv[2] + "/experiments/fuse_hf_vit_cifar10.yaml"))
settings["fusion"]["ot_solver"] = sys.argv[1]
rows = [{"pixel_values": row[None], "labels": torch.zeros(1, dtype=torch.long)} for row in images]
device = torch.device("cpu")
began = time.perf_counter()
with torch.no_grad():
    seen = get_activations(settings, models, rows, logging.ERROR, device)
    held = {f"model_{side}": model_to_dict(model) for side, model in enumerate(models)}
    hf_vit_fusion(settings, held, seen, 0.5, device, logging.ERROR)
"""
REPORT = """
seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, (peak - start) / 1024]))
"""


def measured(python: str, code: str, *arguments: str) -> tuple[float, float]:
    """Seconds and MiB of a process of its own."""
    command = [python, "-W", "ignore", "-c", COMMON + code + REPORT, *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, memory = json.loads(output.splitlines()[-1])
    return seconds, memory


def main(clone: str, python: str) -> None:
    found = []
    for solver, kind in (("sinkhorn", "soft"), ("emd", "exact")):
        ours, theirs = measured(sys.executable, OURS, solver), measured(python, THEIRS, solver, clone)
        for what, mine, other in zip(("", ", peak MiB above the start"), ours, theirs, strict=True):
            ratio, aim = mine / other, None if what else 0.2
            work = f"fusing two ViTs of the paper's size, {kind} plans{what}"
            found.append(Comparison(work, "the authors' repository", mine, other, ratio, ratio, ratio, aim))
    write("transformer_fusion_official", found)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        print("skipped: give a clone of the authors' repository and an interpreter that runs it")
