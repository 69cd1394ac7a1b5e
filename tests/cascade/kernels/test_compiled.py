"""The kernels as an H100 would run them, as far as that can be seen without one: they compile, and use its vectors."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PTX by kernel, from a process in which triton is no interpreter."""
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.helpers.compile_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_swap_moves_vectors(code: dict[str, str]) -> None:
    """A table that the compiler can't trust to be aligned would cost four times as many loads."""
    for dtype in ("fp32", "bf16"):
        for kind in ("swap", "delta"):
            text = code[f"{kind}, {dtype}"]
            assert text.count("ld.global.v4.b32") == 4, "four vectors of pristine weights a thread"
            assert text.count("st.global.v4.b32") == (4 if dtype == "fp32" else 2)
            assert "div.s32" not in text, "no division of integers"
            assert "bar.sync" not in text, "no value moves between threads"


def test_products_run_on_tensor_cores(code: dict[str, str]) -> None:
    for dtype in ("fp32", "bf16"):
        for text in (code[f"product, {dtype}"], code[f"linear, {dtype}"]):
            assert "wgmma.mma_async" in text
            assert "cp.async" in text, "the next tiles are loaded during the product"
        assert "wgmma.mma_async" in code[f"product, {dtype}, odd"]
    assert code["product, bf16"].count(".f32.bf16.bf16") > 0


def test_depthwise_moves_vectors(code: dict[str, str]) -> None:
    assert "ld.global.v4" in code["depthwise, fp32"]


def test_bits_are_loaded_a_step_ahead(code: dict[str, str]) -> None:
    """Each step of a product loads the bits that the next one reads."""
    lines = code["product, bf16"].splitlines()
    product = next(i for i, line in enumerate(lines) if "wgmma.mma_async" in line)
    begin = max(i for i, line in enumerate(lines[:product]) if line.startswith("$L__BB"))
    end = next(i for i in range(product, len(lines)) if f"bra \t{lines[begin].partition(':')[0]}" in lines[i])
    loop = lines[begin:end]
    (at,) = (i for i, line in enumerate(loop) if "ld.global.b16" in line)
    (register,) = re.findall(r"\{ (%rs\d+) \}", loop[at])
    reads = [i for i, line in enumerate(loop) if re.search(rf", {register}\b", line)]
    assert reads and max(reads) < at
