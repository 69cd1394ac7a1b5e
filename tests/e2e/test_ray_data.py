"""An offline job on a Ray cluster of several nodes, one of which dies in mid-job."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

import cascade
from cascade.batch import predict_files
from tests.conftest import need
from tests.e2e.conftest import ROOT

pytestmark = pytest.mark.e2e
STORE = 80 * 2**20  # bytes of a node's object store
ENVIRONMENT = {
    "CASCADE_EXECUTOR": "plain",
    "NUMBA_NUM_THREADS": "1",  # as many as OpenMP: with another number the last digits are others
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
}
ROWS, BATCH = 10, 4
Nodes = tuple[Any, list[Any]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """A head without a CPU and two nodes with one each; Ray is connected to them."""
    need(find_spec("ray"), "Ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes = [made.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
            ray.init(address=made.address, logging_level=logging.ERROR, log_to_driver=False)
            yield made, nodes
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture(scope="module")
def local(bundle_path: Path, cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of the same job by the command, without Ray."""
    out = tmp_path_factory.mktemp("local") / "out"
    command = [sys.executable, "-m", "cascade.cli", "predict", str(cifar_folder), "nowhere.png", "--out", str(out)]
    options = ["--bundle", str(bundle_path), "--rows", str(ROWS), "--batch", str(BATCH), "--threads", "1"]
    subprocess.run([*command, *options], check=True, env=os.environ | ENVIRONMENT, cwd=ROOT, capture_output=True)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """The Parquet files by name, to the byte."""
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def actors() -> list[psutil.Process]:
    """The processes of the actors that make parts."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("MapWorker" in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_a_node_and_an_actor_die_and_the_output_is_complete(
    cluster: Nodes, local: Path, bundle_path: Path, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from handlers.ray.data import on_ray

    made, nodes = cluster
    monkeypatch.setenv("CASCADE_EXECUTOR", "plain")
    monkeypatch.chdir(ROOT)
    died: list[str] = []

    def progress(done: int, total: int | None) -> None:
        assert total == 301
        if done >= 40 and "node" not in died:
            made.remove_node(nodes[1], allow_graceful=False)
            died.append("node")
        elif done >= 150 and "actor" not in died:
            for process in actors():
                process.kill()
            died.append("actor")

    found = predict_files(
        cascade.load(bundle_path),
        [str(cifar_folder), "nowhere.png"],
        tmp_path / "out",
        cascade.Options(labels=5, neighbours=0),
        embedding="float16",
        batch=BATCH,
        threads=1,
        rows=ROWS,
        progress=progress,
        run=on_ray(bundle_path, actors=2, cluster=lambda cpus: nullcontext()),
    )
    assert died == ["node", "actor"]
    assert (found.rows, found.fresh, found.errors) == (301, 301, {"unreadable": 1})
    assert contents(tmp_path / "out") == contents(local)


def test_what_is_done_is_not_done_again(
    cluster: Nodes, local: Path, bundle_path: Path, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that the command began goes on with Ray."""
    import shutil

    from handlers.ray.data import on_ray

    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    shutil.copytree(local, out)
    for number in (3, 30):
        (out / f"part-{number:05d}.parquet").unlink()
    found = predict_files(
        cascade.load(bundle_path),
        [str(cifar_folder), "nowhere.png"],
        out,
        cascade.Options(labels=5, neighbours=0),
        embedding="float16",
        batch=BATCH,
        threads=1,
        rows=ROWS,
        run=on_ray(bundle_path, executor="plain", actors=1, cluster=lambda cpus: nullcontext()),
    )
    assert (found.rows, found.fresh) == (301, 11)
    assert contents(out) == contents(local)
