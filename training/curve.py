"""The learning curve: one line of JSON per step, and checks for training problems."""

import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import IO, Any

from cascade import atomic
from cascade.errors import CascadeError
from training.masking import MaskedModel
from training.recipe import Recipe

CURVE = "curve.jsonl"
SPARSE = 0.05  # a tensor with a smaller share of active weights is nearly switched off
COLLAPSED = 0.05  # an embedding has collapsed if a smaller share of the prototypes are nearest to any image
CROWDED = 0.8  # or if a larger share of a batch is nearest to the same prototype
RISEN, WINDOW = 1.5, 20  # factor by which the mean loss must exceed that of the first steps; steps in the mean
FIRST = 5
FLAGS = {"scores": "--lr", "weights": "--lr", "channels": "--channel-lr"}


class Curve:
    """Appends to ``curve.jsonl``; a resumed training first drops the steps that it will repeat."""

    def __init__(self, path: Path, begin: int) -> None:
        self.losses = _keep(path, begin)
        self._file: IO[str] = open(path, "a")  # noqa: SIM115  # closed by close()
        self._clock, self._counted, self._warned = time.perf_counter(), begin, set[str]()

    def write(self, line: dict[str, Any]) -> None:
        self.losses.append(line["loss"])
        self._file.write(json.dumps(line) + "\n")

    def steps_since(self, step: int) -> int:
        """The number of steps since the last detailed line."""
        return step + 1 - self._counted

    def rate(self, step: int) -> float:
        """Steps per second since the last detailed line."""
        return round(self.steps_since(step) / (time.perf_counter() - self._clock), 3)

    def flush(self, step: int) -> None:
        self._file.flush()
        self._clock, self._counted = time.perf_counter(), step + 1

    def warn(self, name: str, step: int, problems: Mapping[str, str]) -> None:
        """Warn of each problem once."""
        for what in problems.keys() - self._warned:
            warnings.warn(f"{name}, step {step}: {problems[what]}", stacklevel=3)
        self._warned |= problems.keys()

    def close(self) -> None:
        self._file.close()

    def check_rise(self, name: str, head_steps: int, rates: Mapping[str, float]) -> None:
        """Stop a training whose loss rises from the start, and name the learning rate that is too high.

        Args:
            rates: initial learning rates, by what they train.

        Raises:
            CascadeError: the loss is far above that of the first steps.
        """
        step = len(self.losses)
        if step < FIRST + WINDOW or step % WINDOW:
            return
        first, last = mean(self.losses[:FIRST]), mean(self.losses[-WINDOW:])
        if last <= RISEN * first:
            return
        rose = f"the loss of {name} rose from {first:.3g} to {last:.3g} in {step} steps"
        if step - WINDOW < head_steps:
            raise CascadeError(
                f"{rose}, while only the head was trained: lower --head-lr (now {rates['head']:g}),"
                " and choose another --run"
            )
        now = " and ".join(f"{FLAGS[kind]} (now {rate:g})" for kind, rate in rates.items() if kind in FLAGS)
        raise CascadeError(f"{rose}, after the network began to train: lower {now}, and choose another --run")


def problems(model: MaskedModel, line: Mapping[str, Any], recipe: Recipe, images: int) -> dict[str, str]:
    """Problems and what to do, by the name of a nearly inactive parameter, or ``embedding``.

    Args:
        images: number of images behind the line; few images can't be nearest to many prototypes.
    """
    out = {}
    if not recipe.share:
        out = {p: f"only {s:.1%} of {p} is active: lower --lr" for p, s in model.sparse(SPARSE)}
    few = max(2.0, COLLAPSED * min(recipe.prototypes, images))
    if "nearest" in line and (line["nearest"] < few or line["largest"] > CROWDED):
        out["embedding"] = (
            f"the images are nearest to {line['nearest']:.1f} of {recipe.prototypes} prototypes, {line['largest']:.0%}"
            " of a batch to the same one, the embedding collapses: lower --lr, or take a larger --batch"
        )
    return out


def _keep(path: Path, begin: int) -> list[float]:
    """Drop the lines from step ``begin`` on, and return the losses of the others."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    kept = [line for line in lines if line["step"] < begin]
    with atomic.file(path, alone=True) as temporary:
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    return [line["loss"] for line in kept]
