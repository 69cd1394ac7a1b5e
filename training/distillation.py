"""Measure the gain and the cost of distillation on held-out images."""

import time
from typing import Any

import numpy as np
import torch

from cascade.model.preprocessing import Preprocessing
from training import evaluate, teacher
from training.objectives import Distillation
from training.run import Run

TIMED = 16  # images per timed pass


def measure(run: Run) -> dict[str, Any]:
    """Measure frozen backbone, distilled student and teacher on the held-out images.

    ``distance`` is the loss of the objective; ``knn`` the accuracy of cosine k-NN on plain features, if there are class
    folders. ``cost`` is the time of a teacher's pass relative to a student's.
    """
    backbone, preprocessing = teacher.load(run)
    wanted = teacher.evaluation_features(run, "test")
    out: dict[str, Any] = {
        "student_size": run.preprocessing.size,
        "teacher_size": preprocessing.size,
        "teacher": backbone.name,
    }
    if teacher.is_same_network(run):
        loss = Distillation(run.recipe, run.preprocessing, teacher.features(run))
        for name, mask in (("frozen", "frozen"), ("distilled", "dispatcher")):
            features = torch.from_numpy(run.features(mask)[1])
            out.setdefault("distance", {})[name] = round(float(loss.distance(features, wanted)), 4)
    if run.images.labels is not None and run.held_out.labels is not None:
        known, truth = torch.from_numpy(run.images.labels), torch.from_numpy(run.held_out.labels)
        pairs = {"frozen": run.features("frozen"), "distilled": run.features("dispatcher")}
        pairs["teacher"] = teacher.evaluation_features(run, "train"), wanted
        for name, (bank, queries) in pairs.items():
            accuracy = evaluate.knn(
                torch.from_numpy(bank), torch.from_numpy(queries), known, truth, run.recipe.neighbors
            )
            out.setdefault("knn", {})[name] = round(accuracy, 4)
    seconds = [_seconds(run, p) for p in (run.preprocessing, preprocessing)]
    out["cost"] = round(seconds[1] / seconds[0], 2)
    return out


def verdict(run: Run, found: dict[str, Any], seconds: float) -> str:
    """Summarize the gain and the cost in one line."""
    price = (
        f"{seconds:.0f} s of training; a pass of the teacher at {found['teacher_size']} px costs"
        f" {found['cost']:.1f} times as much"
    )
    if (knn := found.get("knn")) is not None:
        gain = 100 * (knn["distilled"] - knn["frozen"])
        return (
            f"distilled at {found['student_size']} px: k-NN {100 * knn['distilled']:.1f} %, frozen"
            f" {100 * knn['frozen']:.1f} % ({gain:+.1f} points), teacher {100 * knn['teacher']:.1f} %, in {price}"
        )
    if (distance := found.get("distance")) is not None:
        share = 1 - distance["distilled"] / distance["frozen"]
        return (
            f"distilled at {found['student_size']} px: {share:.0%} of the distance to the teacher is gone, in {price}"
        )
    return f"distilled at {found['student_size']} px from {found['teacher']}, in {price}"


def _seconds(run: Run, preprocessing: Preprocessing) -> float:
    """Seconds of a pass of the student's backbone over some images of this size."""
    x = torch.zeros(TIMED, 3, preprocessing.size, preprocessing.size, device=run.backbone.weights.device)
    run.executor.swap(None)
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        run.executor.run(x)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))
