"""What the demo prints: one table of all images, and the few facts that a person remembers."""

import math
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cascade.client import Client
from cascade.engine.results import ItemError, Options, Prediction
from handlers.demo_images import NOBODY, DemoError, Sample
from handlers.demo_traffic import Rates

VOTE = 0.1  # temperature of the neighbors' similarities
AT_ONCE = 16  # requests
TOLERANCE = 1e-3  # of scores: the servers may batch the images differently
UNKNOWN = "unknown_domain"  # kind of the error where an image fits no bundle


@dataclass(frozen=True)
class Answered:
    """An image and what the servers say of it; None where it fits no bundle. ``seconds``: of each server."""

    sample: Sample
    answer: Prediction | None
    seconds: tuple[float, ...]

    @property
    def label(self) -> tuple[str, float] | None:
        """The label and its score; without a head the class that most neighbors vote for, and its share of the votes.

        A vote weighs as in the k-NN evaluation of a training.
        """
        if self.answer is None:
            return None
        if self.answer.labels:
            return self.answer.labels[0].name, self.answer.labels[0].score
        votes: dict[str, float] = {}
        for n in self.answer.neighbors:
            votes[n.label or n.name] = votes.get(n.label or n.name, 0.0) + math.exp(n.similarity / VOTE)
        best = max(votes, key=votes.__getitem__, default=None)
        return None if best is None else (best, votes[best] / sum(votes.values()))

    @property
    def right(self) -> bool | None:
        """Whether the label is the true one, or an image of nobody is unknown; None where nobody knows."""
        if self.sample.customer == NOBODY:
            return self.answer is None
        if self.sample.label is None:
            return None
        return self.label is not None and re.sub(r"\W+", "-", self.label[0]) == self.sample.label


def show(samples: Sequence[Sample], torchserve: Client, asgi: Client, console: Console) -> list[Answered]:
    """Ask both servers about each image and print the table. Raises DemoError."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("image", "customer", "sure", "label", "masks", "ms"):
        table.add_column(name, justify="right" if name in ("sure", "ms") else "left", no_wrap=name in ("image", "ms"))
    answers = []
    with console.status("asking"):
        for sample in samples:
            answers.append(_ask(sample, (torchserve, asgi)))
            if table.rows and sample.customer != answers[-2].sample.customer:
                table.add_section()
            table.add_row(*row(answers[-1]))
    console.print(table)
    console.print(
        "sure: calibrated probability of the customer, - where the request named it; label with its score, without a"
        " head that of the nearest neighbors with its share of their votes; ms: TorchServe, ASGI",
        style="dim",
    )
    return answers


def count(samples: Sequence[Sample], asgi: Client) -> list[Answered]:
    """Ask the ASGI server about many images at once, to count the right labels. Raises DemoError."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda sample: _ask(sample, (asgi,)), samples))


def _ask(sample: Sample, clients: Sequence[Client]) -> Answered:
    """What all servers answer, up to rounding. Raises DemoError."""
    options, found, seconds = Options(sample.bundle), [], []
    for client in clients:
        start = time.perf_counter()
        answer = client.predict(sample.content, options)
        seconds.append(time.perf_counter() - start)
        if isinstance(answer, ItemError) and answer.kind != UNKNOWN:
            raise DemoError(f"{sample.name}: {answer.kind}: {answer.message}")
        found.append(answer)
    one, other = found[0], found[-1]
    if not same(one.to_json(), other.to_json()):
        raise DemoError(f"{sample.name}: TorchServe answers {one}, ASGI {other}")
    return Answered(sample, one if isinstance(one, Prediction) else None, tuple(seconds))


def same(one: Any, other: Any) -> bool:
    """Whether two JSON answers are equal, up to rounding of their numbers."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return math.isclose(one, other, abs_tol=TOLERANCE)
    return bool(one == other)


def row(answered: Answered) -> list[str]:
    """The cells of one image; green where it is known to be right, red where it is not."""
    ms = " ".join(f"{1000 * seconds:3.0f}" for seconds in answered.seconds)
    color = {True: "green", False: "red", None: "default"}[answered.right]
    name, answer = escape(answered.sample.name), answered.answer
    if answer is None:
        return [name, f"[{color}]unknown[/]", "", "", "", ms]
    sure = f"{answer.dispatch.confidence:.2f}" if answer.dispatch else "-"
    label = f"[{color}]{escape(answered.label[0])}[/] {answered.label[1]:.2f}" if answered.label else "-"
    return [name, escape(answer.bundle), sure, label, " ".join(answer.masks), ms]


def summary(
    overview: dict[str, Any],
    answers: Sequence[Answered],
    counted: Sequence[Answered],
    rates: Rates | None,
    console: Console,
) -> None:
    """The facts: memory, labels, dispatch, throughput, equality.

    Args:
        overview: of the ASGI server. answers: in the table. counted: of the customers, in the table or not.
    """
    lines = Table.grid(padding=(0, 2, 0, 0))
    for name, text in _facts(overview, answers, counted, rates):
        lines.add_row(f"[bold]{name}[/]", text)
    console.print(lines)


def _facts(
    overview: dict[str, Any], answers: Sequence[Answered], counted: Sequence[Answered], rates: Rates | None
) -> Iterator[tuple[str, str]]:
    bundles, resident = overview["bundles"], overview["memory"]["backbone"]
    backbones = {bundle["backbone"] for bundle in bundles}
    yield "backbone", f"{escape(', '.join(sorted(backbones)))}, resident once: {_mb(resident)}"
    sizes = {bundle["name"]: bundle["bytes"] for bundle in bundles}
    yield "models", escape(", ".join(f"{name} {_mb(size)}" for name, size in sizes.items()))
    copies = f"{len(sizes)} resident copies" if len(sizes) > 1 else "a resident copy"
    yield "", f"together {_mb(sum(sizes.values()))}; {copies} would take {_mb(resident / len(backbones) * len(sizes))}"
    if counted:
        yield "labels", f"{_right(counted)} are right; the table shows {sum(a.sample.shown for a in counted)}"
        sent = sum(a.answer is not None and a.answer.bundle == a.sample.customer for a in counted)
        strange = [a for a in answers if a.sample.customer == NOBODY]
        unknown = f"; {_right(strange)} that belong to nobody are unknown" if strange else ""
        yield "dispatch", f"{sent} of {len(counted)} images went to their customer" + unknown
    if rates:
        ratio, names = rates.mixed / rates.single, ", ".join(map(escape, rates.bundles))
        yield "throughput", f"{ratio:.2f} of that of a single model: {rates.mixed:.0f} images/s for {names} in turn"
    yield "answers", f"TorchServe and the ASGI server gave the same to all {len(answers)} images"


def _right(answers: Sequence[Answered]) -> str:
    return f"{sum(bool(a.right) for a in answers)} of {len(answers)}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
