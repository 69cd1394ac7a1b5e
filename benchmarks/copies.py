"""N adapted models on one machine: as masks over one backbone, as resident copies, and as files loaded per request.

    python -m benchmarks.copies --backbone resnet50 --models 20

Each way is a process of its own. Rounds are interleaved; in a round every way answers the same requests, one image
each, for models drawn uniformly. Memory is what the process grew by for the models. Weights are seeded random ones:
neither time nor bytes depend on their values.
"""

import argparse
import ctypes
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.report import Figure, figure, report
from cascade import backbone as backbones
from cascade import masks
from cascade.backbone import Backbone
from cascade.executors.torch import TorchExecutor
from cascade.masks import Mask
from cascade.residency import Residency

DENSITY = 0.925  # active weights of a mask; the paper's on CIFAR-100
HELD = 8  # masks that may be materialised at once
Answer = Callable[[int, Tensor], object]


def random_masks(backbone: Backbone, count: int) -> list[Mask]:
    """Masks over every maskable weight, ``DENSITY`` of them active."""
    n = backbone.flat.numel()
    seeds = [torch.Generator().manual_seed(i) for i in range(count)]
    return [Mask(str(i), 0, masks.pack(torch.rand(n, generator=g) < DENSITY)) for i, g in enumerate(seeds)]


def as_masks(backbone: Backbone, count: int) -> Answer:
    """Packed masks over the resident backbone; ``HELD`` of them materialised at most."""
    executor = TorchExecutor(backbone, Residency(HELD * backbone.flat.nbytes))
    packed = random_masks(backbone, count)

    def answer(model: int, x: Tensor) -> Tensor:
        executor.swap(packed[model])
        return executor.run(x)

    return answer


def as_copies(backbone: Backbone, count: int) -> Answer:
    """A whole model for each, all resident."""
    models = [_copy(backbone, mask) for mask in random_masks(backbone, count)]

    def answer(model: int, x: Tensor) -> Any:
        with torch.inference_mode():
            return models[model](x.contiguous(memory_format=torch.channels_last))

    return answer


def as_files(backbone: Backbone, count: int) -> Answer:
    """One resident model that loads a state_dict from disk (page cache) whenever another one is asked for."""
    keep = tempfile.TemporaryDirectory(prefix="cascade-copies-")
    folder = Path(keep.name)
    for i, mask in enumerate(random_masks(backbone, count)):
        save_file(_copy(backbone, mask).state_dict(), folder / f"{i}.safetensors")
    model, now = _copy(backbone, random_masks(backbone, 1)[0]), [-1]

    def answer(wanted: int, x: Tensor, keep: object = keep) -> Any:  # the folder goes when the process ends
        with torch.inference_mode():
            if now[0] != wanted:
                model.load_state_dict(load_file(folder / f"{wanted}.safetensors"))
                now[0] = wanted
            return model(x.contiguous(memory_format=torch.channels_last))

    return answer


def _copy(backbone: Backbone, mask: Mask) -> nn.Module:
    model = deepcopy(backbone.model)
    flat, parameters = masks.apply(backbone, mask), dict(model.named_parameters())
    for name, (begin, end) in backbone.spans.items():
        parameters[name].data = flat[begin:end].view(parameters[name].shape).clone()
    return model


WAYS: dict[str, Callable[[Backbone, int], Answer]] = {
    "masks over one backbone": as_masks,
    "resident copies": as_copies,
    "load_state_dict per request": as_files,
}


def resident_bytes(process: psutil.Process) -> int:
    """Of a process, after it gave back to the kernel what it no longer uses."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(process.memory_info().rss)


def peer(way: str, name: str, count: int, threads: int, size: int, pipe: Connection) -> None:
    """A process: builds its way, says how many bytes that took, then answers rounds of requests."""
    torch.set_num_threads(threads)
    backbone = backbones.load(name, "random:0")
    process, x = psutil.Process(), torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        backbone.run(x)
    before = resident_bytes(process)
    answer = WAYS[way](backbone, count)
    for model in range(count):
        answer(model, x)
    pipe.send(resident_bytes(process) - before)
    while (requests := pipe.recv()) is not None:
        begin = time.perf_counter()
        for model in requests:
            answer(model, x)
        pipe.send((time.perf_counter() - begin) / len(requests))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--backbone", default="resnet50")
    options.add_argument("--size", type=int, default=224)
    options.add_argument("--models", type=int, default=20)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--requests", type=int, default=20, help="in a round")
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    spawn, draw = multiprocessing.get_context("spawn"), np.random.default_rng(0)
    peers, pipes, bytes_grown, seconds = [], {}, {}, dict[str, list[float]]()
    for way in WAYS:
        pipes[way], theirs = spawn.Pipe()
        arguments = (way, chosen.backbone, chosen.models, chosen.threads, chosen.size, theirs)
        peers.append(spawn.Process(target=peer, args=arguments, daemon=True))
        peers[-1].start()
        bytes_grown[way] = pipes[way].recv()
        seconds[way] = []
    for _ in range(chosen.rounds):
        requests = draw.integers(chosen.models, size=chosen.requests).tolist()
        for way, pipe in pipes.items():
            pipe.send(requests)
            seconds[way].append(pipe.recv())
    for process, pipe in zip(peers, pipes.values(), strict=True):
        pipe.send(None)
        process.join()  # it removes its files

    ours = next(iter(WAYS))
    title = f"{chosen.models} adapted {chosen.backbone}, {chosen.size} px, one image a request, uniform"
    table = Table("way", "MB for the models", "ms a request (median)", "least", "most", title=title)
    figures: dict[str, Figure] = {}
    for way, taken in seconds.items():
        ms = figure([1000 * s for s in taken])
        table.add_row(way, f"{bytes_grown[way] / 1e6:.0f}", *(f"{v:.1f}" for v in (ms.value, *ms.spread)))
        slug = way.replace(" ", "_")
        figures[f"mb_{slug}"] = figure([bytes_grown[way] / 1e6])
        figures[f"ms_{slug}"] = ms
        if way != ours:
            ratios = [theirs / mine for theirs, mine in zip(taken, seconds[ours], strict=True)]
            figures[f"throughput_over_{slug}"] = figure(ratios)
    report(f"copies-{chosen.backbone}", figures, table)


if __name__ == "__main__":
    main()
