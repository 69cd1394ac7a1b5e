"""An offline job on a Ray cluster of several nodes, one of which dies in mid-job; see ``tests.helpers.ray_job``."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import need
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.e2e
ENVIRONMENT = {
    "CASCADE_EXECUTOR": "plain",
    "NUMBA_NUM_THREADS": "1",  # as many as OpenMP: with another number the last digits are others
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # whether the user has a token or not
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


def run(*command: object) -> str:
    """What a Python process prints."""
    command = (sys.executable, "-m", *command)
    done = subprocess.run(
        [*map(str, command)],
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        start_new_session=True,  # Ray may end its whole process group
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """The Parquet files by name, to the byte."""
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_a_node_and_an_actor_die_and_the_output_is_that_of_the_local_job(
    bundle_path: Path, cifar_folder: Path, tmp_path: Path
) -> None:
    """And a job that was begun without Ray goes on with it: what is done is not done again."""
    need(find_spec("ray"), "Ray is not installed")
    local, out, resumed = (tmp_path / name for name in ("local", "out", "resumed"))
    options = ("--bundle", bundle_path, "--rows", 10, "--batch", 4, "--threads", 1)
    run("cascade.cli.main", "predict", cifar_folder, "nowhere.png", "--out", local, *options)
    shutil.copytree(local, resumed)
    for number in (3, 30):
        (resumed / f"part-{number:05d}.parquet").unlink()
    found = json.loads(run("tests.helpers.ray_job", bundle_path, cifar_folder, out, resumed).splitlines()[-1])
    assert set(found["died"]) == {"node", "actor"}
    assert found["jobs"] == [[301, 301, {"unreadable": 1}], [301, 11, {"unreadable": 1}]]
    assert len(contents(local)) == 31
    assert contents(out) == contents(local)
    assert contents(resumed) == contents(local)
