"""``cascade predict --ray``: the units of an offline job, processed by the actors of a Ray cluster.

The job, its folder, units and rows are those of ``cascade.offline.predict``. An actor makes the part of a unit and
sends it to this process, which writes it. If an actor or a node is lost, another actor repeats its unit. A killed job
resumes when it is started again, with or without Ray.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cascade import metrics
from cascade.atomic import write_bytes
from cascade.bundle.format import digest
from cascade.cpus import usable
from cascade.engine.engine import Engine
from cascade.engine.executors.selection import Kind
from cascade.engine.results import ItemError
from cascade.errors import CascadeError
from cascade.offline.job import Job, extent, part_path, todo
from cascade.offline.predict import Run, Work, make_part, stages_since
from cascade.offline.sources import Unit
from cascade.progress import Advance
from cascade.ray_session import RayError
from handlers.ray.cluster import running

BLOCKS = 2000  # most blocks of the list of units; Ray Data moves whole blocks
Rows = dict[str, np.ndarray]


class Actor:
    """An engine that makes parts.

    Raises:
        CascadeError: the bundle cannot be loaded on this node, or is not the job's.
    """

    def __init__(self, job: Job, bundle: Path, weights: Path | None, executor: Kind, batch: int, threads: int) -> None:
        from cascade.engine.engine import load

        # Ray limits OpenMP to the actor's CPUs; numba would start one thread per core of the machine.
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        self.job, self.batch, self.threads = job, batch, threads
        self.engine = load(bundle, weights=weights, executor=executor)
        loaded = self.engine.find(job.bundle, job.version)
        if isinstance(loaded, ItemError) or digest(loaded) != job.digest:
            raise CascadeError(f"{bundle} is not the same bundle on every node: copy it there, or share the folder")
        if job.folder:
            os.chdir(job.folder)  # relative sources are relative to it

    def __call__(self, units: Rows) -> dict[str, Any]:
        """Process numbers and units; return numbers, rows, Parquet files and the seconds of each stage."""
        rows, parts, before = [], [], metrics.stage_seconds()
        with tempfile.TemporaryDirectory(prefix="cascade-") as folder:
            path = Path(folder, "part.parquet")
            for unit in map(Unit.from_json, units["unit"].tolist()):
                rows.append(make_part(self.engine, self.job, unit, path, self.batch, self.threads))
                parts.append(path.read_bytes())
        stages = json.dumps(stages_since(before))
        return {"number": units["number"], "rows": np.array(rows), "part": parts, "stages": [stages] * len(rows)}


def on_ray(
    bundle: Path,
    weights: Path | None = None,
    executor: Kind = "auto",
    actors: int | None = None,
    cluster: Callable[[int], AbstractContextManager[Any]] = running,
) -> Run:
    """Make the parts of a job on Ray, for ``cascade.offline.predict.predict_files``.

    Args:
        bundle, weights, executor: as ``cascade.engine.engine.load`` takes them, the same on every node.
        actors: maximum number, with a CPU each; None for all CPUs of the cluster.
        cluster: context manager that starts Ray, given the CPUs to use on this machine.
    """
    return partial(_run, bundle.resolve(), weights and weights.resolve(), executor, actors, cluster)


def _run(
    bundle: Path,
    weights: Path | None,
    executor: Kind,
    actors: int | None,
    cluster: Callable[[int], AbstractContextManager[Any]],
    engine: Engine,
    job: Job,
    folder: Path,
    batch: int,
    threads: int,
    progress: Advance,
) -> Work:
    missing = [{"number": number, "unit": unit.to_json()} for number, unit in todo(folder)]
    done, total = extent(folder)
    work = Work(0, dict.fromkeys(metrics.stage_seconds(), 0.0))
    progress(done, total)
    if not missing:
        return work
    with cluster(actors or usable()):
        import ray

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        most = min(actors or int(ray.cluster_resources().get("CPU", 1)), len(missing))
        made = ray.data.from_items(missing, override_num_blocks=min(len(missing), BLOCKS)).map_batches(
            Actor,
            fn_constructor_args=(job, bundle, weights, executor, batch, threads),
            batch_size=1,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        )
        try:
            for row in made.iter_rows():
                write_bytes(part_path(folder, row["number"]), [row["part"]])
                spent = json.loads(row["stages"])
                stages = {name: seconds + spent[name] for name, seconds in work.stages.items()}
                work = Work(work.rows + int(row["rows"]), stages, most)
                progress(done + work.rows, total)
        except ray.exceptions.RayError as error:
            raise RayError(f"the job stopped: {_last_line(error)}; start it again to resume") from error
    return work


def _last_line(error: Exception) -> str:
    """The last line of an actor's traceback, which Ray puts into the message."""
    return str(error).strip().splitlines()[-1][:300]
