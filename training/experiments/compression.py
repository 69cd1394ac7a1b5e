r"""Tables 2 and 3: masks and fine-tuned weights under compressors, and experts as deltas.

python -m training.experiments.compression
python -m training.experiments.compression --set backbone=resnet50 --set source=package:imgsim/model.pth \
    --set steps=40 --set clusters=1
"""

import bz2
import gzip
import lzma
import time
from collections.abc import Callable
from typing import Any

import torch

from cascade.errors import CascadeError
from cascade.model import masks
from training import clusters, experts, finetune
from training.experiments.lab import DEEP, Lab, main, name_of
from training.experiments.report import Table
from training.run import Run

SMALL = DEEP | {"seeds": 1}
PAPER = {"data": ("cifar100", "sun397"), "epochs": 150}
REDUCED = {  # masks, weights; in %
    "cifar100": {"gzip": (78.32, 6.99), "bz2": (79.24, 4.69), "lzma": (80.73, 7.70), "lz4": (59.06, -0.39)}
    | {"snappy": (62.57, -0.0046)},
    "sun397": {"gzip": (81.25, 6.99), "bz2": (82.11, 4.69), "lzma": (83.32, 7.69), "lz4": (62.52, -0.39)}
    | {"snappy": (66.54, -0.0046)},
}
Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def codecs() -> dict[str, Codec]:
    """Compress and decompress functions of each codec at its default level, zstd at level 19 as in bundles."""
    try:
        import cramjam
        import lz4.frame  # type: ignore[import-untyped]
        import zstandard
    except ImportError as error:
        raise CascadeError(f"{error}: pip install 'cascade-vision[paper]'") from error
    return {
        "gzip": (gzip.compress, gzip.decompress),
        "bz2": (bz2.compress, bz2.decompress),
        "lzma": (lzma.compress, lzma.decompress),
        "lz4": (lz4.frame.compress, lz4.frame.decompress),
        "snappy": (lambda b: bytes(cramjam.snappy.compress(b)), lambda b: bytes(cramjam.snappy.decompress(b))),
        "zstd": (zstandard.ZstdCompressor(19).compress, zstandard.ZstdDecompressor().decompress),
    }


def experiment(lab: Lab) -> list[Table]:
    """For each data set: masks beside weights, and experts as deltas."""
    tables = []
    for name in lab.sets():
        short = name_of(name)
        reduced = {
            codec: {"mask reduction %": mask, "weights reduction %": weights}
            for codec, (mask, weights) in REDUCED.get(short, {}).items()
        }
        both = Table(f"Tables 2 and 3: {short}, sizes after compression", published=reduced, digits=2)
        delta = Table(f"{short}: bits a weight of experts", digits=3)
        for seed in lab.seeds:
            run = lab.trained(name, seed)
            clusters.fit(run)
            experts.train(run)
            tuned = tuned_weights(run)
            mask = run.dispatcher.bits.numpy().tobytes()
            for codec, cells in compare(mask, tuned).items():
                both.add(codec, cells)
            for codec, cells in deltas(run).items():
                delta.add(codec, cells)
            note = f"{short}: {8 * len(mask)} masks, {100 * masks.density(run.backbone, run.dispatcher):.2f} % active"
            lab.notes.append(f"{note}, {len(mask)} bytes packed; weights {len(tuned)} bytes")
        tables += [both, delta]
    return tables


def tuned_weights(run: Run) -> bytes:
    """Bytes of the same parameters as float32 after full fine-tuning with the same loss, in the flat buffer's order."""
    model = finetune.train(run)
    first = run.backbone.offset(run.mask_from)
    names = [n for n, (begin, _) in run.backbone.spans.items() if begin >= first]
    return torch.cat([model.learned[n].detach().flatten().cpu() for n in names]).numpy().tobytes()


def compare(mask: bytes, weights: bytes) -> dict[str, dict[str, float]]:
    """By codec: reduction of mask and weights, their ratio after compression, and decoding speed."""
    out = {"plain": {"mask bytes / weights' %": 100 * len(mask) / len(weights), "mask bits a weight": 1.0}}
    for codec, (compress, decompress) in codecs().items():
        small, large = compress(mask), compress(weights)
        out[codec] = {
            "mask reduction %": 100 * (1 - len(small) / len(mask)),
            "weights reduction %": 100 * (1 - len(large) / len(weights)),
            "mask bytes / weights' %": 100 * len(small) / len(large),
            "mask bits a weight": len(small) / len(mask),
            "mask decode MB/s": len(mask) / 1e6 / _fastest(lambda d=decompress, s=small: d(s)),  # type: ignore[misc]
        }
    return out


def deltas(run: Run) -> dict[str, dict[str, float]]:
    """By codec: bits of an expert's mask alone, and as a difference from the dispatcher's; mean over experts."""
    out: dict[str, dict[str, float]] = {"bits that differ": {"as delta": 0.0}}
    for expert in run.experts:
        out["bits that differ"]["as delta"] += masks.difference(run.dispatcher, expert, run.backbone) / len(run.experts)
    for codec, (compress, _) in codecs().items():
        alone = together = 0.0
        for expert in run.experts:
            base = run.dispatcher.bits[-len(expert.bits) :]
            if (_weights(run, expert.start) - _weights(run, run.mask_from)) % 8:
                raise CascadeError(
                    "the experts' masks begin inside a byte of the dispatcher's: leave --expert-from out"
                )
            alone += len(compress(expert.bits.numpy().tobytes())) / len(expert.bits) / len(run.experts)
            together += len(compress((expert.bits ^ base).numpy().tobytes())) / len(expert.bits) / len(run.experts)
        out[codec] = {"alone": alone, "as delta": together}
    return out


def _weights(run: Run, start: int) -> int:
    return run.backbone.weights.numel() - run.backbone.offset(start)


def _fastest(call: Callable[[], Any], rounds: int = 3) -> float:
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
