"""Two processes as one: the masks of one process with the same batch, to float tolerance."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cascade.bundle.format import read
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from cascade.model.preprocessing import Preprocessing
from tests.helpers.paths import ROOT
from training.checkpoint import DONE
from training.curve import CURVE
from training.loop import fit, seed_everything
from training.masking import mask_backbone
from training.objectives import Batch, SelfSupervised, Supervised
from training.recipe import Recipe

pytestmark = pytest.mark.slow

RECIPE = Recipe("", size=32, batch=64, lr=0.05, local_crops=1, prototypes=30, projection=16, queue=64, queue_from=0.3)
STEPS = 6
TRAIN = """
import sys
from pathlib import Path
import numpy as np
from tests.training.test_distributed import train
from training import distributed
with distributed.together():
    assert distributed.world() == 2
    train(Path(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3] == "supervised")
"""


def train(folder: Path, pixels: np.ndarray, supervised: bool, recipe: Recipe = RECIPE) -> None:
    """Some steps on a small network, in however many processes this is."""
    torch.set_num_threads(1)
    backbone = backbones.load("test_resnet", "random:0")
    p = Preprocessing.of(backbone.config, 32)
    seed_everything(0)
    objective: SelfSupervised | Supervised = SelfSupervised(recipe, backbone.features, p)
    if supervised:
        objective = Supervised(recipe, backbone.features, p, np.arange(len(pixels)) % 10)
    fit("m", mask_backbone(backbone, 2), objective, pixels, recipe, STEPS, folder)


@pytest.fixture(scope="module")
def pixels(cifar: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in cifar])


def test_two_processes_train_the_mask_of_one(pixels: np.ndarray, tmp_path: Path) -> None:
    """By gloo, with torchrun; of SwAV, whose codes and queue are those of the whole batch."""
    np.save(tmp_path / "pixels.npy", pixels)
    train(tmp_path / "one", pixels, False)
    (tmp_path / "train.py").write_text(TRAIN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    program = [str(tmp_path / "train.py"), str(tmp_path / "two"), str(tmp_path / "pixels.npy"), "swav"]
    done = subprocess.run([*torchrun, *program], cwd=ROOT, env=env(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    one, two = load_file(tmp_path / "one" / DONE), load_file(tmp_path / "two" / DONE)
    scores = [name for name in one if name.startswith("scores.")]
    assert scores and one.keys() == two.keys()
    moved = torch.cat([(one[n] - RECIPE.initial).abs().flatten() for n in scores])
    assert moved.max() > 0.05, "the scores must have moved, or this proves little"
    # Adam's first steps are of full size however small a gradient is: what is left is where it is all rounding.
    apart = torch.cat([(one[n] - two[n]).abs().flatten() for n in scores])
    assert (apart > 1e-3).float().mean() < 1e-3
    torch.testing.assert_close(two["objective.queue"], one["objective.queue"], rtol=1e-3, atol=1e-3)
    lines = [(tmp_path / each / CURVE).read_text().splitlines() for each in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == STEPS, "the first process alone writes"
    alone, both = (json.loads(each[-1]) for each in lines)
    assert both["nearest"] == pytest.approx(alone["nearest"], rel=0.05), "the images of both are counted"


def test_a_whole_cascade_by_torchrun(cifar_folder: Path, tmp_path: Path) -> None:
    """Decoded and stored once, trained by both, clustered, measured and packed by the first."""
    out = tmp_path / "store" / "small" / "1"
    options = "--backbone test_resnet --source random:0 --size 32 --mask-from layer3 --steps 4 --expert-steps 2"
    options += " --batch 32 --local-crops 0 --draws 1 --prototypes 20 --clusters 2"
    options += " --router centroid --dim 8 --bank 20 --lr 0.2 --price-per-hour 900"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = ["-m", "--", "training.pipeline", str(cifar_folder), "--run", str(tmp_path / "run"), "--out", str(out)]
    done = subprocess.run(
        [*torchrun, *command, *options.split()], cwd=ROOT, env=env(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    bundle = read(out)
    assert len(bundle.experts) == 2 and bundle.card.accuracy
    curve = (tmp_path / "run" / "dispatcher" / CURVE).read_text().splitlines()
    costs = re.findall(r"cost: wall seconds [\d.]+,.* money [\d.]+", " ".join(done.stderr.split()))
    assert len(costs) == 1, "the first process alone tells it"
    assert len(curve) == 4 and not list((tmp_path / "run").rglob("*.tmp"))


def env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def gradients(objective: Supervised, backbone: backbones.Backbone, batches: list[Batch]) -> Tensor:
    """Of the scores, for the mean loss of the batches."""
    model = mask_backbone(backbone, 2)
    model.train()
    for batch in batches:
        (objective.loss(model, batch) / len(batches)).backward()
    return torch.cat([s.grad.flatten() for s in model.scores.values() if s.grad is not None])


def test_a_batch_in_parts_has_the_gradient_of_the_whole(pixels: np.ndarray) -> None:
    """Exact for cross-entropy, a mean over images: the same pieces, each with its own random numbers."""
    backbone = backbones.load("test_resnet", "random:0")
    seed_everything(0)
    p = Preprocessing.of(backbone.config, 32)
    objective = Supervised(RECIPE, backbone.features, p, np.arange(len(pixels)) % 10)
    with torch.no_grad():  # a head of zeros would pass no gradient on to the mask
        objective.module.weight.normal_(generator=torch.Generator().manual_seed(0))

    def batch(first: int, last: int) -> Batch:
        rows = np.arange(16 * first, 16 * last)
        drawn = [torch.Generator().manual_seed(piece) for piece in range(first, last)]
        return Batch(torch.from_numpy(pixels[rows]), rows, 0.0, drawn)

    whole = gradients(objective, backbone, [batch(0, 4)])
    parts = gradients(objective, backbone, [batch(0, 2), batch(2, 4)])
    assert whole.norm() > 0
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_accumulated_steps_of_the_loop(pixels: np.ndarray, tmp_path: Path) -> None:
    for parts in (1, 4):
        train(tmp_path / str(parts), pixels, True, replace(RECIPE, accumulate=parts))
    one, four = (load_file(tmp_path / str(parts) / DONE) for parts in (1, 4))
    apart = torch.cat([(one[n] - four[n]).abs().flatten() for n in one if n.startswith("scores.")])
    assert (apart > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize(("batch", "parts"), [(64, 3), (64, 8), (40, 2)])
def test_a_batch_that_cannot_be_cut(batch: int, parts: int, pixels: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=f"a batch of {batch} can't be cut into {parts} parts for 1 processes"):
        train(tmp_path, pixels, True, replace(RECIPE, batch=batch, accumulate=parts))
