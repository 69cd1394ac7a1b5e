"""Train a cascade with several seeds and all controls: the first seed gives the bundle, its card has all results."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from cascade.model.router import Calibration, route
from training import clusters, dispatcher, embed, evaluate, experts, export
from training.cli import Watch
from training.data import dataset
from training.evaluate import Features
from training.recipe import Recipe
from training.routing import ood_of, router_of
from training.run import Run, begin, read_json

SEEDS = (0, 1, 2)
STRANGERS = "fashion-mnist"


def train(folder: Path, recipe: Recipe, out: Path, watch: Watch) -> None:
    """Train all seeds, put their means into one card, and write the bundle; resumes if interrupted."""
    runs = [begin(folder / f"seed-{seed}", replace(recipe, seed=seed), watch) for seed in SEEDS]
    steps = recipe.steps + recipe.clusters * recipe.expert_steps
    watch.say(
        f"{2 * len(SEEDS) * steps} steps of {recipe.batch} images: {len(SEEDS)} seeds, each dispatcher {recipe.steps},"
        f" {recipe.clusters} experts {recipe.expert_steps}, an equal-steps control {steps}; stored features of"
        f" {recipe.draws} draws of {recipe.limit} images, which are made first"
    )
    results = [one(run) for run in runs]
    features = evaluate.collect(runs[0])
    accuracy = combine(results) | {"ood_auroc": {STRANGERS: separation(runs[0], features)}}
    evaluate.show(accuracy, Console())
    gain, spread = accuracy["gain_over_frozen"]["conditional"]["knn"]
    watch.say(f"conditional over frozen, whitened k-NN: {100 * gain:+.1f} points ± {100 * spread:.1f}")
    watch.say(f"wrote {export.export(runs[0], features, accuracy, out, thumbnails=True)}")


def one(run: Run) -> dict[str, Any]:
    """Run every stage and control of one seed, unless it was already evaluated."""
    done = run.folder / "evaluation.json"
    if not done.exists():
        dispatcher.train(run)
        dispatcher.controls(run)
        clusters.fit(run)
        experts.train(run)
        evaluate.evaluate(run, evaluate.collect(run))
    return read_json(done)


def combine(results: list[dict[str, Any]]) -> dict[str, Any]:
    """[mean, sample standard deviation] over seeds of every accuracy, and of the gain over the frozen backbone."""
    first = results[0]
    out = {k: first[k] for k in ("k", "dim", "bank_images", "held_out_images")} | {"seeds": len(results)}
    for part in ("whitened", "plain"):
        out[part] = {
            method: {m: _spread([r[part][method][m] for r in results]) for m in scores}
            for method, scores in first[part].items()
        }
    out["gain_over_frozen"] = {
        method: {
            m: _spread([r["whitened"][method][m] - r["whitened"]["frozen backbone"][m] for r in results])
            for m in scores
        }
        for method, scores in first["whitened"].items()
        if method != "frozen backbone"
    }
    return out


def separation(run: Run, features: Features, limit: int = 2_000) -> dict[str, float]:
    """AUROC of the out-of-domain score against images of another data set, and of 1 - confidence.

    In-domain images are the held-out ones that were not used for its percentiles.
    """
    strangers = dataset.load(STRANGERS, "test", limit)
    other = embed.blocks(run.executor, [run.dispatcher], embed.batches(strangers, run.preprocessing))[0]
    both = [torch.from_numpy(features.test[0][1::2]), torch.from_numpy(other)]
    truth = np.repeat([0, 1], [len(x) for x in both])
    router, ood = router_of(run), ood_of(run)
    summary = read_json(run.folder / clusters.SUMMARY)
    calibration = Calibration(summary["slope"], summary["intercept"])
    doubt = torch.cat([1 - route(router, calibration, x)[1] for x in both])
    score = torch.cat([ood.score(x) for x in both])
    return {
        "ood": round(float(roc_auc_score(truth, score)), 4),
        "one_minus_confidence": round(float(roc_auc_score(truth, doubt)), 4),
    }


def _spread(values: list[float]) -> list[float]:
    return [round(float(np.mean(values)), 4), round(float(np.std(values, ddof=1)), 4)]
