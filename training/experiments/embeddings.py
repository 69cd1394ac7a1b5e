"""Figures 6 and 7: embeddings before, after and as a cascade in one plane; the classes of each cluster.

python -m training.experiments.embeddings
"""

from typing import Any

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from training import clusters, evaluate, experts, fusion
from training.experiments import report
from training.experiments.lab import Lab, labels, main, name_of, pair
from training.experiments.main import SMALL as CASCADE
from training.experiments.report import Table

SMALL = CASCADE | {"data": ("cifar10",), "seeds": 1}
PAPER = {"data": ("cifar100",), "epochs": 150}
CLASSES, POINTS = 20, 2000  # of figure 6
TOP = (1, 2, 3, 5, 10, 20, 50)


def experiment(lab: Lab) -> list[Table]:
    """The planes of the first seed, how well the embeddings separate classes, and the clusters' common classes."""
    apart = Table("Figure 6: silhouette of the classes in the whitened embedding", digits=3)
    common = Table("Figure 7: % of each cluster's training images in its most common classes")
    for name in lab.sets():
        for seed in lab.seeds:
            run = lab.trained(name, seed)
            clusters.fit(run)
            experts.train(run)
            features = evaluate.collect(run)
            known, truth = labels(run)
            first = np.flatnonzero(truth.numpy() < CLASSES)[:POINTS]
            plain = pair(run, None)
            parts = {
                "pretrained": (plain[0][None], plain[1][None]),
                "adapted": features.slots("dispatcher", run.recipe.slots),
                "cascade": features.slots("conditional", run.recipe.slots),
            }
            planes = {}
            for title, (bank, queries) in parts.items():
                dim = fusion.dimension(run.recipe, run.backbone.features, len(run.images))
                embedded = fusion.embed(fusion.fit(bank, dim, "scale", seed), queries[:, first]).numpy()
                apart.add(title, {name_of(name): silhouette_score(embedded, truth[first].numpy(), metric="cosine")})
                if seed == lab.seeds[0]:
                    perplexity = min(30, len(first) // 4)
                    planes[title] = TSNE(metric="cosine", perplexity=perplexity, random_state=seed).fit_transform(
                        embedded
                    )
            shares = common_classes(known.numpy(), features.assigned)
            for k, share in enumerate(shares):
                common.add(
                    f"{name_of(name)}, cluster {k}",
                    {f"top {t}": share[t - 1] for t in TOP if t <= len(share)},
                )
            if planes:
                _draw(lab, planes, truth[first].numpy())
                x = list(range(1, len(shares[0]) + 1))
                curves = {f"cluster {k}": (x, list(share)) for k, share in enumerate(shares)}
                report.draw(
                    lab.path("embeddings.clusters.png"), {"Figure 7": curves}, "most common classes", "% of the cluster"
                )
    return [apart, common]


def common_classes(classes: np.ndarray, assigned: np.ndarray) -> list[np.ndarray]:
    """For each cluster, the cumulative % of its images in its 1, 2, .. most common classes."""
    counts = [np.bincount(classes[assigned == k], minlength=int(classes.max()) + 1) for k in np.unique(assigned)]
    return [100 * np.cumsum(np.sort(c)[::-1]) / c.sum() for c in counts]


def _draw(lab: Lab, planes: dict[str, np.ndarray], classes: np.ndarray) -> None:
    figure, axes = report.plots().subplots(1, len(planes), figsize=(4.5 * len(planes), 4.2))
    axis: Any
    for axis, (title, points) in zip(axes, planes.items(), strict=True):
        axis.scatter(points[:, 0], points[:, 1], c=classes, cmap="tab20", s=5)
        axis.set(title=title, xticks=[], yticks=[])
    report.save(figure, lab.path("embeddings.planes.png"))


if __name__ == "__main__":
    main(experiment, SMALL, PAPER)
