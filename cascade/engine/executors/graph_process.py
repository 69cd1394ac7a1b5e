"""Export ONNX graphs in a child process, while passes of other bundles run in this one.

The exporter holds the interpreter's lock for up to 50 ms at a time, so passes would wait for it. The child gets the
backbone's constants, exports and optimizes on one thread with a lower priority, and writes the graphs to the cache on
disk (``graph_cache``); see ``graph_export``. It ends with this process, because its standard input is closed then.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import safetensors.torch

from cascade.model.folding import Folded

SECONDS = 300.0
"""Most seconds for a child; it takes 5 to 10 on an idle core."""
NICE = 7  # a saturated server leaves the child a sixth of a core
ROOT = Path(__file__).parents[3]
log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """A graph to export: stages ``start`` to ``stop`` for an input of this shape, without the batch; and its file.

    See ``onnx.made`` for ``reorder``.
    """

    start: int
    stop: int | None
    shape: Sequence[int]
    reorder: bool
    path: str


def export(folded: Folded, graphs: Sequence[Wanted]) -> None:
    """Export graphs in a child process, and wait for it. If it fails, this is logged, and the files are missing."""
    units = {f"{unit.module}.{part}" for unit in folded.units for part in ("weight", "bias")}
    inputs = units | set(folded.loose)
    constants = {n: t.detach().cpu().clone() for n, t in folded.model.state_dict().items() if n not in inputs}
    about = json.dumps({"backbone": folded.backbone.name, "graphs": graphs})
    with _in_memory() as request, _in_memory() as errors:
        try:
            request.write(safetensors.torch.save(constants, {"about": about}))
            request.flush()
            reason = _run(request.fileno(), errors)
        except OSError as error:  # no memory, or no more processes
            reason = str(error)
    if reason:
        log.warning("graphs of %s are exported in the server, a child process failed: %s", folded.backbone.name, reason)


def _in_memory() -> IO[bytes]:
    return os.fdopen(os.memfd_create("graphs"), "w+b")


def _run(request: int, errors: IO[bytes]) -> str:
    """Run the child; returns why it failed, or an empty text."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    environment.pop("PROMETHEUS_MULTIPROC_DIR", None)  # it has no metrics
    # -P: a module in the working folder must not shadow one of ours.
    command = [sys.executable, "-P", "-m", "cascade.engine.executors.graph_export", str(request)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=[request], env=environment
    ) as child:
        try:
            # Here, because importing PyTorch is half of the child's work.
            os.setpriority(os.PRIO_PROCESS, child.pid, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
            code = child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"it took more than {SECONDS:g} s"
        finally:
            child.kill()
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return "" if code == 0 else lines[-1][:200] if lines and code > 0 else f"it ended with {code}"
