"""An offline job on a Ray cluster of two nodes on this machine, of which one dies, and then the other one's actor.

python -m tests.helpers.ray_job BUNDLE IMAGES OUT RESUMED

A process of its own: Ray's second start in one does not work everywhere. OUT is a new job, RESUMED one that was begun
without Ray. The last line is what the jobs came to.
"""

import json
import logging
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

import cascade
from cascade.offline.predict import Summary, predict_files
from handlers.ray.batch_predict import on_ray

STORE = 80 * 2**20  # bytes of a node's object store
ROWS, BATCH = 10, 4


def job(bundle: Path, images: str, out: Path, actors: int, progress: Any = lambda done, total: None) -> Summary:
    return predict_files(
        cascade.load(bundle),
        [images, "nowhere.png"],
        out,
        cascade.Options(labels=5, neighbors=0),
        embedding="float16",
        batch=BATCH,
        threads=1,
        rows=ROWS,
        progress=progress,
        run=on_ray(bundle, actors=actors, cluster=lambda cpus: nullcontext()),
    )


def main(bundle: Path, images: str, out: Path, resumed: Path) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE},
    )
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        died: list[str] = []

        def progress(done: int, total: int | None) -> None:
            if done >= 40 and "node" not in died:
                cluster.remove_node(nodes[1], allow_graceful=False)
                died.append("node")
            elif done >= 150 and "actor" not in died:
                with suppress(psutil.NoSuchProcess):  # it ended by itself: the next one, at the next part
                    died.extend("actor" for process in _actors() if not process.kill())

        whole = job(bundle, images, out, 2, progress)
        rest = job(bundle, images, resumed, 1)
    finally:
        ray.shutdown()
        cluster.shutdown()
    fresh = [[each.rows, each.fresh, each.errors] for each in (whole, rest)]
    print(json.dumps({"died": died, "jobs": fresh}))


def _actors() -> list[psutil.Process]:
    """The processes that make parts."""
    return [p for p in psutil.Process().children(recursive=True) if any("MapWorker" in part for part in _command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # gone, or a zombie
        return []


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
