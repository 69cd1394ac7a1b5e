"""Each kernel against its plain reference, on random masks."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cascade.kernels import cpu
from cascade.kernels.materialize import materialize, materialize_plain
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask, pack, unpack
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module", params=["tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return backbones.load(request.param, "random:0")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.925, 1.0])
@pytest.mark.parametrize("start", [0, 3, -1])
def test_fused_swap_equals_plain(backbone: Backbone, share: float, start: int) -> None:
    stage = backbone.stage(start)
    n = backbone.weights.numel() - backbone.offset(stage)
    mask = Mask("m", stage, pack(torch.rand(n, generator=torch.Generator().manual_seed(start)) < share))
    poisoned = torch.full((n,), float("nan"))
    found = materialize(backbone, mask, poisoned)
    assert found is poisoned
    torch.testing.assert_close(found, materialize_plain(backbone, mask, torch.empty(n)), rtol=1e-6, atol=0)


def aligned(n: int) -> np.ndarray:
    """Float32 at a cache line, as torch allocates it."""
    return torch.full((n,), float("nan")).numpy()


@pytest.mark.parametrize("stream", [False, True], ids=["through the caches", "past them"])
def test_pieces_that_begin_and_end_anywhere(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real layers are multiples of eight; a kernel must not count on it."""
    monkeypatch.setattr(cpu, "STREAM", 0 if stream else 1 << 62)
    n, draw = 1000, np.random.default_rng(0)
    weights, active = draw.normal(size=n).astype(np.float32), draw.random(n) < 0.6
    bits = pack(torch.from_numpy(active)).numpy()
    begin, end = np.array([0, 3, 21, 22, 520, 999]), np.array([3, 21, 22, 500, 999, 1000])
    scales = draw.random((len(begin), cpu.LANES)).astype(np.float32)
    out = aligned(n)
    cpu.masked(bits, weights, begin, end, scales, out)
    for b, e, lanes in zip(begin, end, scales, strict=True):
        want = weights[b:e] * active[b:e] * lanes[np.arange(b, e) % cpu.LANES]
        np.testing.assert_allclose(out[b:e], want, rtol=1e-6)
    assert np.isnan(out[500:520]).all(), "between pieces nothing is written"


def test_an_output_that_no_cache_line_begins() -> None:
    """Stores past the caches need one; elsewhere they would kill the process."""
    whole = aligned(cpu.STREAM // 4 + 1)
    n = len(whole) - 1
    weights, bits = np.ones(n, np.float32), np.full(n // 8, 0b01010101, np.uint8)
    cpu.masked(bits, weights, np.array([0]), np.array([n]), np.full((1, 16), 2, np.float32), whole[1:])
    assert whole[1::2].min() == 2 and whole[2::2].max() == 0


@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize("rows, width", [(16, 32), (20, 27), (5, 8), (33, 9)])
def test_reorder(block: int, rows: int, width: int) -> None:
    """Rows that fill their blocks or do not, columns shuffled and padded, bits that begin inside a byte."""
    draw = np.random.default_rng(rows)
    before = 5
    active = draw.random(before + rows * width) < 0.5
    columns = np.append(draw.permutation(width), [-1, -1, -1]).astype(np.int32)
    groups = -(-rows // block)
    task = [before, 0, rows, groups, block, width, 0, len(columns)]
    size = groups * block * len(columns)
    out = np.zeros(-(-size // 16) * 2, np.uint8)
    cpu.reorder(pack(torch.from_numpy(active)).numpy(), np.array([task]), columns, out)
    matrix = np.zeros((groups * block, width + 1), bool)
    matrix[:rows, :width] = active[before:].reshape(rows, width)
    want = matrix[:, columns].reshape(groups, block, -1).transpose(0, 2, 1).reshape(-1)
    np.testing.assert_array_equal(unpack(torch.from_numpy(out), size).numpy(), want)


def test_many_threads_without_openmp() -> None:
    """There numba's own scheduler ends the process when two threads call it at once."""
    program = """
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from cascade.kernels import cpu
n = 1_600_000
bits, weights, scales = np.full(n // 8, 255, np.uint8), np.ones(n, np.float32), np.full((2, 16), 2, np.float32)
begin, end = np.array([0, n // 2]), np.array([n // 2, n])

def swap(_):
    out = np.zeros(n, np.float32)
    cpu.masked(bits, weights, begin, end, scales, out)
    return out.min()

with ThreadPoolExecutor(4) as pool:
    assert all(least == 2 for least in pool.map(swap, range(50)))
"""
    environment = os.environ | {"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=True)
