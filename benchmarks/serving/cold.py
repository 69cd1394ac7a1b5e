"""Time from a new bundle on disk to its first answer, verified, over a warm request. The backbone is resident."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import synthetic
from benchmarks.report import Figure, Rows, figure
from benchmarks.subprocesses import peers, ratios, rounds
from cascade.bundle.format import read, write


def build(name: str, count: int) -> Callable[[tuple[int, int]], object]:
    """``(images, version)``: a request for a version, 0 for the warm one."""
    backbone = synthetic.load(name)
    pixels = synthetic.noise(backbone, 8)
    keep = tempfile.TemporaryDirectory(prefix="cascade-cold-")
    paths = [write(synthetic.single(backbone, "m", v), Path(keep.name, "m", str(v))) for v in range(count)]
    for path in paths:
        for file in path.iterdir():  # out of the page cache
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    engine = synthetic.engine_of([read(paths[0])], 2 * synthetic.mask_bytes(backbone))

    def work(wanted: tuple[int, int], keep: object = keep) -> bool:
        images, version = wanted
        if version:
            engine.add(read(paths[version]))
        engine.run([synthetic.item(engine, "m", pixels[i], version=str(version)) for i in range(images)])
        return True

    return work


def measure(name: str, count: int, rows: Rows) -> dict[str, Figure]:
    out = {}
    with peers({"cold": (build, name, 2 * count + 4)}) as running:
        engine = running["cold"]
        version = 1
        for images, goal in ((1, None), (8, "<= 1.2")):
            engine.time((images, 0))
            warm, cold = [], []
            for _ in range(count):
                warm.append(rounds({"cold": engine}, [(images, 0)], warm=0)["cold"][0])
                cold.append(engine.time((images, version))[0])
                version += 1
            text = "1 image" if images == 1 else f"{images} images"
            rows.add(f"{text}, a mask never seen", figure([1000 * s for s in cold]), "ms")
            rows.add(f"{text}, warm", figure([1000 * s for s in warm]), "ms")
            out["cold_over_warm" + ("_one_image" if images == 1 else "")] = figure(ratios(cold, warm), goal)
    return out
