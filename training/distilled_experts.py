"""Experts without labels that imitate a teacher: ``cascade train photos/ --objective distill --clusters K``.

Images are clustered by the frozen backbone's features. Each cluster gets an expert, which learns the features of the
backbone at a larger input size from the images of its cluster. All experts imitate the same features, so an image needs
its own expert only. The control is one mask distilled on everything for the same total steps, in a run beside this one.
The bundle serves whatever comes closer to the teacher on the held-out images.
"""

from typing import Any

import numpy as np
import torch

from training import clusters, dispatcher, evaluate, experts, teacher
from training.evaluate import Features
from training.objectives import Distillation
from training.run import Run, write_json

JOINT, EXPERTS = "one mask", "experts"


def train(run: Run) -> Run:
    """Train experts and control; a dispatcher of no steps is the frozen backbone. Returns the run of the control."""
    dispatcher.train(run, steps=0)
    clusters.fit(run)
    experts.train(run)
    joint = run.beside("joint", clusters=0, steps=run.expert_steps * run.recipe.clusters)
    dispatcher.train(joint)
    return joint


def compare(run: Run, joint: Run, features: Features) -> dict[str, Any]:
    """Distance to the teacher on the held-out images, and k-NN accuracy if there are class folders."""
    loss = Distillation(run.recipe, run.preprocessing, teacher.features(run))
    wanted = teacher.evaluation_features(run, "test")
    found = {
        "frozen": run.features("frozen"),
        JOINT: joint.features("dispatcher"),
        EXPERTS: tuple(blocks[0] for blocks in features.slots("conditional", "routed")),
    }
    distances = {
        way: round(float(loss.distance(torch.from_numpy(test), wanted)), 4) for way, (_, test) in found.items()
    }
    facts: dict[str, Any] = {
        "serves": min((JOINT, EXPERTS), key=distances.__getitem__),
        "steps": {"experts": run.recipe.clusters * run.expert_steps, "each": run.expert_steps},
        "distance": distances,
    }
    if run.images.labels is not None and run.held_out.labels is not None:
        known, truth = torch.from_numpy(run.images.labels), torch.from_numpy(run.held_out.labels)
        for way, (bank, queries) in found.items():
            both = torch.from_numpy(np.asarray(bank)), torch.from_numpy(np.asarray(queries))
            facts.setdefault("knn", {})[way] = round(evaluate.knn(*both, known, truth, run.recipe.neighbors), 4)
    write_json(run.folder / "comparison.json", facts)
    return facts


def verdict(facts: dict[str, Any]) -> str:
    """One sentence: whether the experts are worth having."""
    frozen, one, own = (facts["distance"][way] for way in ("frozen", JOINT, EXPERTS))
    said = (
        f"of the distance to the teacher, experts remove {1 - own / frozen:.0%} and one mask {1 - one / frozen:.0%} in"
        f" the same {facts['steps']['experts']} steps"
    )
    if knn := facts.get("knn"):
        said += f" (k-NN {100 * knn[EXPERTS]:.1f} and {100 * knn[JOINT]:.1f} %)"
    return f"{said}; the bundle serves: {facts['serves']}"
