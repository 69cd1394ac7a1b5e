"""An offline job against the engine's bare passes: throughput, swaps, and memory by number of images.

    python -m benchmarks.batch
    python -m benchmarks.batch --backbone resnet50 --images 512 --rounds 5 --many 100000

Throughput: a cascade with five experts and random weights (time does not depend on their values), and real images as
JPEG files of the backbone's input size in a tar shard. In each round the engine runs the same number of decoded images
in the same batches, and the job reads, decodes, runs and writes them. Memory: a small network and real 32-pixel images
in shards, in a separate process for each number of images.
"""

import io
import multiprocessing
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from benchmarks.images import jpegs, sheet
from benchmarks.report import Rows, figure, report
from benchmarks.report import single as once
from benchmarks.synthetic import cascade, engine_of, load, mask_bytes, single
from cascade.engine.engine import Engine
from cascade.engine.items import Item
from cascade.engine.results import Options
from cascade.offline.predict import BATCH, predict_files, prepare, settle
from cascade.offline.sources import plan, read

FEW = 1000


def shard(path: Path, images: Sequence[bytes], count: int, suffix: str) -> Path:
    """A tar with ``count`` images; the available ones are repeated."""
    with tarfile.open(path, "w") as file:
        for i in range(count):
            info = tarfile.TarInfo(f"{i:06d}.{suffix}")
            info.size = len(images[i % len(images)])
            file.addfile(info, io.BytesIO(images[i % len(images)]))
    return path


def prepared(engine: Engine, tar: Path) -> list[Item]:
    """The images of one batch, decoded."""
    job = settle(engine, [tar], Options(), "float16")
    pairs = [pair for unit in plan([tar]) for pair in read(unit)][:BATCH]
    items = [prepare(engine, job, load) for _, load in pairs]
    return [item for item in items if isinstance(item, Item)]


def small_engine(name: str, size: int) -> Engine:
    """One mask over a small network, for images of ``size`` pixels."""
    bundle = single(load(name), "small", 0)
    preprocessing = replace(bundle.preprocessing, size=size, crop_pct=1.0)
    card = bundle.card.model_copy(update={"preprocessing": preprocessing.to_json()})
    return engine_of([replace(bundle, preprocessing=preprocessing, card=card)], 2**30)


def peak_bytes() -> int:
    """Peak memory of this program; getrusage would return its parent's if that was higher."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def many(pipe: Connection, name: str, size: int, folder: Path, count: int) -> None:
    """Predict ``count`` images in a separate process; returns its peak memory in bytes, and images per second."""
    torch.set_num_threads(2)
    engine = small_engine(name, size)
    out = folder / f"small-{count}"
    found = predict_files(engine, [folder / "small.tar"] * (count // FEW), out, embedding="float16", rows=1000)
    assert found.rows == count and not found.errors
    pipe.send((peak_bytes(), found.images_per_second))


def apart(*arguments: object) -> tuple[int, float]:
    """Result of ``many``."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=many, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        found: tuple[int, float] = ours.recv()
    except EOFError:
        sys.exit(f"a job ended with exit code {process.exitcode}")
    finally:
        process.join()
    return found


def main(
    name: Annotated[str, typer.Option("--backbone")] = "resnet50",
    expert_from: Annotated[int, typer.Option(help="First stage of the experts' masks.")] = 0,
    count: Annotated[int, typer.Option("--images", help="Images in a round, each way.")] = 512,
    rounds: int = 5,
    small: Annotated[str, typer.Option(help="Backbone of the measurement of memory.")] = "lcnet_050",
    small_size: Annotated[int, typer.Option("--size", help="Pixels of its images.")] = 32,
    many: Annotated[int, typer.Option(help=f"Its images, beside {FEW}; 0: without it.")] = 100_000,
) -> None:
    """Measure offline jobs against bare passes, and their memory."""
    backbone = load(name)
    bundle = cascade(backbone, "made", 5, expert_from)
    engine = engine_of([bundle], 6 * mask_bytes(backbone))
    size = backbone.config["input_size"][-1]
    bare, whole, swaps, decode = [], [], [], []
    figures = {}
    with TemporaryDirectory(prefix="cascade-batch-") as temporary:
        folder = Path(temporary)
        tar = shard(folder / "large.tar", jpegs(size), count, "jpg")
        items = prepared(engine, tar)
        engine.run(items[:BATCH])
        for nth in range(rounds):
            begin, left = time.perf_counter(), count
            while left > 0:
                engine.run(items[: min(left, len(items))])
                left -= len(items)
            bare.append(count / (time.perf_counter() - begin))
            begin = time.perf_counter()
            found = predict_files(engine, [tar], folder / f"out-{nth}", embedding="float16")
            whole.append(count / (time.perf_counter() - begin))
            assert found.rows == count and not found.errors
            swaps.append(found.shares["swap"])
            decode.append(found.shares["decode"])
        rows = Rows(f"{name}, {count} images a round")
        rows.add("bare passes, decoded before", figure(bare), "images/s")
        rows.add("job", figure(whole), "images/s")
        rows.add("of its time: decode, as a share of all threads", figure(decode), "")
        figures["job_over_bare"] = figure([w / b for w, b in zip(whole, bare, strict=True)], ">= 0.9")
        figures["swap_share"] = figure(swaps, "<= 0.02")
        if many:
            images = []
            for image in [*sheet("cifar10"), *sheet("fashion_mnist")]:
                image.save(out := io.BytesIO(), "png")
                images.append(out.getvalue())
            shard(folder / "small.tar", images, FEW, "png")
            least, slow = apart(small, small_size, folder, FEW)
            most, speed = apart(small, small_size, folder, many)
            rows.add(f"{small}, {FEW} images", once(slow), "images/s, peak", least)
            rows.add(f"{small}, {many} images", once(speed), "images/s, peak", most)
            figures["peak_memory_ratio"] = once(most / least, "<= 1.1")
            figures["growth_bytes_an_image"] = once((most - least) / (many - FEW))
            figures["images_of_memory"] = once(many)
    executor_class = type(engine.executor(bundle)).__name__
    report(f"batch-{name}", figures, rows.table, executor=executor_class)


if __name__ == "__main__":
    typer.run(main)
