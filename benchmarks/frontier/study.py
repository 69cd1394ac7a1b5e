"""One backbone, data set and seed: the masks that its methods share, trained when first asked for, their features."""

import os
import zlib
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.frontier import learn, sets
from benchmarks.frontier.lean import Tail
from benchmarks.frontier.learn import Budget, State
from cascade.model.router import Router
from training import clusters, fusion
from training.evaluate import by_cluster, fit_probe, knn

DIM = 128
NEIGHBOURS = 20
Pair = tuple[Tensor, Tensor]
"""Something of the training and of the held-out images: [N, F], [M, F]."""
Choice = tuple[np.ndarray, np.ndarray]
"""Clusters of the training and of the held-out images, int64 [N], [M]."""


class Study:
    """See above; masks are kept as files in ``folder``, so that a study that was stopped goes on."""

    def __init__(self, data: sets.Set, tail: Tail, seed: int, budget: Budget, folder: Path) -> None:
        self.data, self.tail, self.seed, self.budget, self.folder = data, tail, seed, budget, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.features: Callable[[str], Pair] = cache(self._features)
        self._made: dict[str, Pair] = {}

    def state(self, name: str, train: Callable[[], State] | None = None) -> State:
        """A trained mask by name, trained by ``train`` unless it is there."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            assert train is not None, f"{name} is not trained"
            temporary = path.with_suffix(f".{os.getpid()}")
            save_file({n: t.contiguous() for n, t in train().items()}, temporary)
            temporary.replace(path)
        return load_file(path)

    def once(self, name: str, make: Callable[[], Pair]) -> Pair:
        """What ``make`` gives, made when first asked for."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def key(self, name: str) -> int:
        """A seed of its own for each mask."""
        return zlib.crc32(f"{self.seed} {name}".encode())

    def swav(self, name: str, steps: int, **options: object) -> State:
        """A mask trained by SwAV."""
        return self.state(name, lambda: learn.swav(self.tail, self.data, steps, self.key(name), **options))  # type: ignore[arg-type]

    def distil(self, name: str, steps: int, targets: Callable[[], Tensor], start: State, **options: object) -> State:
        """A mask distilled from embeddings of the training images."""
        return self.state(
            name,
            lambda: learn.distil(self.tail, self.data, steps, self.key(name), targets(), start, **options),  # type: ignore[arg-type]
        )

    def dispatcher(self) -> State:
        return self.swav("dispatcher", self.budget.dispatcher)

    def _features(self, name: str) -> Pair:
        return self._under(self.state(name))

    def _under(self, state: State) -> Pair:
        """Features of the training and the held-out images under a mask."""
        tail, data = self.tail, self.data
        return learn.masked_features(tail, state, data.clean), learn.masked_features(tail, state, data.held_out)

    @cached_property
    def frozen(self) -> Pair:
        return self._under({n: torch.ones_like(w) for n, w in self.tail.weights.items()})

    def route(self, count: int) -> Pair:
        """p(cluster) of the training and the held-out images, [N, K] and [M, K]; prototypes of the dispatcher."""
        return self.once(f"route-{count}", lambda: self._route(count))

    def _route(self, count: int) -> Pair:
        router = self._router(count)
        train, held_out = self.features("dispatcher")
        return router.probabilities(train), router.probabilities(held_out)

    def _router(self, count: int) -> Router:
        state = self.dispatcher()
        projector = {n: state[n] for n in ("head.weight", "head.bias", "prototypes")}
        return clusters.fit_prototypes(projector, self.features("dispatcher")[0].float().numpy(), count, self.seed)

    def plain_route(self, count: int) -> Choice:
        """Clusters by k-means of the frozen backbone's features: what is routed by needs no mask."""
        return self._nearest(self.frozen, count)

    def trunk_route(self, count: int) -> Choice:
        """Clusters by k-means of the mean of the maps that enter the tails: known before any tail is run."""
        return self._nearest((self.data.clean.float().mean(dim=1), self.data.held_out.float().mean(dim=1)), count)

    def _nearest(self, features: Pair, count: int) -> Choice:
        router = clusters.fit_centroids(features[0].float().numpy(), count, self.seed)
        train, held_out = (router.probabilities(x).argmax(dim=1).numpy() for x in features)
        return train, held_out

    def unharmed(self, first: Pair, second: Pair, choice: Choice) -> Pair:
        """The first mask's features, but the second's for clusters that are worse off with the first.

        By the rule of ``training.evaluate``: the first's probe loses more of the cluster's validation images than it
        wins, by over two standard errors.
        """
        count, asked = int(choice[0].max()) + 1, self.data.validation
        own, other = (self.right(self.fused(features))[asked] for features in (first, second))
        out = first[0].clone(), first[1].clone()
        for k, found in enumerate(by_cluster(other, own, choice[1][asked], count)):
            if found["worse"]:
                for split in (0, 1):
                    at = torch.from_numpy(choice[split] == k)
                    out[split][at] = second[split][at]
        return out

    def route_views(self, count: int) -> Tensor:
        """Cluster of each stored view, int64 [N, V]."""
        router, state = self._router(count), self.dispatcher()
        views = self.data.augmented.unbind(dim=1)
        found = (router.probabilities(learn.masked_features(self.tail, state, x)).argmax(dim=1) for x in views)
        return torch.stack(list(found), dim=1)

    def assigned(self, count: int) -> Choice:
        """Clusters of the training and the held-out images."""
        train, held_out = self.route(count)
        return train.argmax(dim=1).numpy(), held_out.argmax(dim=1).numpy()

    def pick(self, names: Sequence[str], choice: Choice) -> Pair:
        """Features of each image under the mask of ``names`` that ``choice`` says; only those are computed."""
        out = []
        for maps, chosen in zip((self.data.clean, self.data.held_out), choice, strict=True):
            found = torch.empty(len(maps), self.tail.width, dtype=torch.float16)
            for k, name in enumerate(names):
                at = torch.from_numpy(np.flatnonzero(chosen == k))
                if len(at):
                    found[at] = learn.masked_features(self.tail, self.state(name), maps[at])
            out.append(found)
        return out[0], out[1]

    def fused(self, *blocks: Pair) -> Pair:
        """Blocks through the product's fusion: PCA, whitened by the scale."""
        train = np.stack([b[0].float().numpy() for b in blocks])
        fusion = fusion.fit(train, min(DIM, train.shape[1] - 1, train.shape[2]), "scale", self.seed)
        return fusion.embed(fusion, train), fusion.embed(fusion, np.stack([b[1].float().numpy() for b in blocks]))

    def fused_apart(self, choice: Choice, *blocks: Pair) -> Pair:
        """A fusion for each cluster, side by side in one wide embedding: those of two clusters share nothing."""
        out = [torch.zeros(len(c), 0) for c in choice]
        for k in range(int(choice[0].max()) + 1):
            rows = [torch.from_numpy(np.flatnonzero(c == k)) for c in choice]
            own = self.fused(*[(b[0][rows[0]], b[1][rows[1]]) for b in blocks])
            for split in (0, 1):
                wide = torch.zeros(len(choice[split]), own[split].shape[1])
                wide[rows[split]] = own[split]
                out[split] = torch.cat([out[split], wide], dim=1)
        return out[0], out[1]

    def padded(self, first: Pair, second: Pair, choice: Choice, count: int) -> Pair:
        """The paper's conditional cascade: a slot for each expert, the others zero."""
        slots = []
        for k in range(count):
            masks = [torch.from_numpy(c == k)[:, None] for c in choice]
            slots.append((second[0] * masks[0], second[1] * masks[1]))
        return self.fused(first, *slots)

    def regressed(self, targets: Tensor, first: Pair, second: Pair | None, choice: Choice | None = None) -> Pair:
        """Blocks mapped to ``targets`` by ridge regression; with ``choice`` a map of its own for each expert's block.

        In its dual form, where one kernel says it all: images of one cluster share the second block's map.
        """
        centred = [tuple(x.float() - b[0].float().mean(dim=0) for x in b) for b in (first, second) if b is not None]
        width = sum(b[0].shape[1] for b in centred)
        train = centred[0][0] @ centred[0][0].T
        cross = centred[0][1] @ centred[0][0].T
        if second is not None:
            same = [torch.from_numpy(c[:, None] == choice[0][None]) for c in choice] if choice else [1, 1]
            train += (centred[1][0] @ centred[1][0].T) * same[0]
            cross += (centred[1][1] @ centred[1][0].T) * same[1]
        centre = targets.mean(dim=0)
        train_ridge = train.clone()
        train_ridge.diagonal().add_(0.01 * float(train.diagonal().sum()) / width)
        weights = torch.linalg.solve(train_ridge, targets - centre)
        return train @ weights + centre, cross @ weights + centre

    def judge(self, embeddings: Pair) -> dict[str, dict[str, float]]:
        """k-NN and probe accuracy in points, of the validation and of the test images."""
        known = torch.from_numpy(self.data.labels)
        out = {}
        for split, at in (("validation", self.data.validation), ("test", ~self.data.validation)):
            queries, truth = embeddings[1][at].float(), torch.from_numpy(self.data.held_out_labels[at])
            out[split] = {"knn": 100 * knn(embeddings[0].float(), queries, known, truth, NEIGHBOURS)}
        right = self.right(embeddings)
        for split, at in (("validation", self.data.validation), ("test", ~self.data.validation)):
            out[split]["probe"] = 100 * float(right[at].mean())
        return out

    def right(self, embeddings: Pair) -> np.ndarray:
        """Which held-out images the probe has right, bool [M]."""
        found: np.ndarray = probe_all(embeddings, torch.from_numpy(self.data.labels)) == self.data.held_out_labels
        return found


def open_study(name: str, of: str, seed: int, mask_from: str, features: Path, own: Path) -> Study:
    """The study of a backbone, a data set and a seed: stored ``features`` are shared, masks are kept in ``own``."""
    backbone = sets.load(name)
    data = sets.open_set(of, backbone, features, mask_from)
    return Study(data, Tail(backbone, backbone.stage(mask_from)), seed, Budget(), own)


def probe_all(embeddings: Pair, known: Tensor) -> np.ndarray:
    """What the linear probe says of every held-out image."""
    mean, scale = embeddings[0].float().mean(dim=0), embeddings[0].float().std()
    fitted = fit_probe((embeddings[0].float() - mean) / scale, known)
    return fitted.predict(((embeddings[1].float() - mean) / scale).numpy())
