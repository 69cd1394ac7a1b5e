"""The child process of ``graph_process``: python -m cascade.engine.executors.graph_export FILE_DESCRIPTOR."""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cascade.engine.executors import graph_cache, onnx
from cascade.engine.executors.graph_process import Wanted
from cascade.model import backbone as backbones
from cascade.model.folding import Folded


def main(request: int) -> None:
    """Export the graphs that a request names, and write them to the cache."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with safe_open(f"/proc/self/fd/{request}", "pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()["about"])
        constants = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    folded = Folded(backbones.load(about["backbone"], "random:0"))  # masked weights are inputs of the graphs
    folded.model.load_state_dict(constants, strict=False)
    for graph in (Wanted(*each) for each in about["graphs"]):
        parts = onnx.made(folded, torch.zeros(1, *graph.shape), graph.start, graph.stop, graph.reorder)
        graph_cache.write(Path(graph.path), parts)


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock would be missed at the end
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
