"""The Dockerfile: clean by hadolint, the same commands as make, and a health check (tests/handlers/test_health.py)."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from handlers import health
from tests.helpers.paths import ROOT


def instructions(keyword: str) -> list[str]:
    """The arguments of every such instruction, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return re.findall(rf"^{keyword} (.*)$", text.replace("\\\n", ""), flags=re.MULTILINE)


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_runs_what_make_runs(device: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "--dry-run", "--always-make", "system", "env", f"DEVICE={device}", "PYTHON=python3"]
    command.append(f"EXTRAS={device},all")  # without the tools of developers
    recipes = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    lines = recipes.stdout.replace("\\\n", "").splitlines()
    made = {step.split(" | ")[0] for line in lines for step in line.split(" && ")}

    runs = [re.sub(r"^--mount=\S+ ", "", line).replace("${DEVICE}", device) for line in instructions("RUN")]
    steps = [shlex.join(shlex.split(step)) for line in runs for step in line.split(" && ")]
    ours = [step for step in steps if device == "gpu" or not step.startswith("apt-get")]  # the CPU's base has Python
    assert len(ours) == (5 if device == "gpu" else 3)
    assert set(ours) <= made
    assert device == "cpu" or {"gcc", "libc6-dev", "python3-dev"} <= set(" ".join(ours).split()), "Triton compiles"


def test_the_gpu_image_serves_on_the_gpu() -> None:
    text = (ROOT / "Dockerfile").read_text()
    gpu = text.partition("FROM ${GPU_BASE} AS gpu")[2].partition("\nFROM ")[0]
    assert "ENV CASCADE_SERVE_DEVICE=cuda" in gpu.splitlines()
    assert "CASCADE_SERVE_DEVICE" not in text.replace(gpu, "")
    assert "--device" not in instructions("CMD")[-1], "the command line would win"


def test_health_check_is_a_module_that_exists() -> None:
    (check,) = instructions("HEALTHCHECK")
    assert json.loads(check.partition("CMD ")[2]) == ["python", "-m", health.__name__]
    (exposed,) = instructions("EXPOSE")
    assert exposed == str(health.PORT) and f"PORT={health.PORT}" in instructions("ENV")[-1].split()


def test_is_closed_by_default_and_not_root() -> None:
    (user,) = instructions("USER")
    assert user == "10001:10001"
    command = json.loads(instructions("CMD")[-1])
    assert "--host" in command and "--api-keys" in command and "--no-auth" not in command


def test_bases_are_exact_versions() -> None:
    bases = [default for name, _, default in (line.partition("=") for line in instructions("ARG")) if "BASE" in name]
    assert len(bases) == 2
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases), "a moving tag is another image next week"
