"""The measures against brute force and scikit-learn, on features of real photos."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from cascade.model.masks import difference
from tests.helpers.paths import DATA
from training import evaluate
from training.cli import Watch
from training.evaluate import knn, probe
from training.routing import router_of
from training.run import Run, resume


@pytest.fixture(scope="module")
def run(bundle_path: Path) -> Run:
    return resume(bundle_path.parents[2] / "run", Watch(None))


@pytest.fixture(scope="module")
def sets(cifar: list[Image.Image]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bank and queries of pixels, [240, 3072] and [60, 3072], with their labels."""
    about = json.loads((DATA / "cifar10.json").read_text())
    x = torch.from_numpy(np.stack([np.asarray(image).ravel() for image in cifar])).float() / 255 - 0.5
    y = torch.tensor(about["labels"])
    return x[:240], x[240:], y[:240], y[240:]


@pytest.mark.parametrize("k", [1, 7, 1000])
def test_knn_is_scikit_learns(sets: tuple[Tensor, Tensor, Tensor, Tensor], k: int) -> None:
    bank, queries, known, truth = sets
    reference = KNeighborsClassifier(
        min(k, 240), metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.1)
    ).fit(bank.numpy(), known.numpy())
    expected = reference.score(queries.numpy(), truth.numpy())
    assert knn(bank, queries, known, truth, k) == pytest.approx(expected)


def test_knn_goes_over_more_queries_than_one_chunk(sets: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    bank, queries, known, truth = sets
    once = knn(bank, queries, known, truth, 5)
    assert 0.1 < once < 0.9, "all right or all wrong would prove little"
    assert knn(bank, queries.repeat(10, 1), known, truth.repeat(10), 5) == pytest.approx(once)
    assert knn(bank, bank, known, known, 1) == 1


def test_probe_is_l2_penalized_multinomial_regression(sets: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Its penalty, 0.01 / N on the mean loss, is C = 100 on scikit-learn's summed one; scale and mean do not matter."""
    bank, queries, known, truth = (t[:, ::16] if t.dim() == 2 else t for t in sets)
    mean, scale = bank.mean(dim=0), bank.std()
    reference = LogisticRegression(C=100, max_iter=3000).fit(((bank - mean) / scale).numpy(), known.numpy())
    expected = reference.score(((queries - mean) / scale).numpy(), truth.numpy())
    assert probe(bank, queries, known, truth) == pytest.approx(expected, abs=0.05)
    assert probe(bank * 1000 + 3, queries * 1000 + 3, known, truth) == pytest.approx(expected, abs=0.05)


def test_features_are_those_of_every_mask_routed_as_the_bundle_will(run: Run) -> None:
    features = evaluate.collect(run)
    assert features.train.shape == (4, 240, 1280) and features.test.shape == (4, 60, 1280)
    router = router_of(run)
    assert router is not None
    for block, clusters in ((features.train[0], features.assigned), (features.test[0], features.routed)):
        assert np.array_equal(router.probabilities(torch.from_numpy(block)).argmax(dim=1), clusters)
    assert all(not np.array_equal(features.train[0], expert) for expert in features.train[1:])


def test_every_method_is_measured_on_the_same_images(run: Run) -> None:
    written = json.loads((run.folder / "evaluation.json").read_text())
    methods = ["frozen backbone", "dispatcher", "conditional", "unconditional"]
    assert list(written["whitened"]) == list(written["plain"]) == methods
    assert written["bank_images"] == 240 and written["held_out_images"] == 60 and written["dim"] == 32
    for table in (written["whitened"], written["plain"]):
        assert all(0.1 < share <= 1 for scores in table.values() for share in scores.values()), "ten classes"
    experts = [round(difference(run.dispatcher, e, run.backbone), 4) for e in run.experts]
    assert written["experts_differ"] == experts and min(experts) > 0


def test_the_table_shows_every_method(run: Run) -> None:
    console = Console(file=io.StringIO(), record=True, width=120)
    evaluate.show(json.loads((run.folder / "evaluation.json").read_text()), console)
    shown = console.export_text()
    assert "unconditional" in shown and "60 held-out images" in shown and "32 dimensions" in shown
    evaluate.show({"k": 20}, console)
    assert "no class folders" in console.export_text()


def test_the_verdict_names_what_is_better() -> None:
    def verdict(frozen: float, own: float, mode: str = "conditional", **controls: float) -> str:
        table = {"frozen backbone": frozen, mode: own, **{k.replace("_", "-", 1): v for k, v in controls.items()}}
        whitened = {k.replace("_", " "): {"knn": v, "probe": 0.0} for k, v in table.items()}
        return evaluate.verdict({"whitened": whitened, "held_out_images": 60}, mode)  # type: ignore[arg-type]

    assert "warning" in (worse := verdict(0.612, 0.609)) and "k-NN 60.9 % against 61.2 % on 60 images" in worse
    assert verdict(0.60, 0.65) == "conditional over the frozen backbone: +5.0 points of k-NN on 60 images"
    assert "one mask trained as long has 2.0 more" in verdict(0.60, 0.65, equal_steps_dispatcher=0.67)
    assert "trained as long" not in verdict(0.60, 0.65, equal_steps_dispatcher=0.64)
    assert "cannot be known" in evaluate.verdict({"held_out_images": 60}, "dispatcher")


def test_a_gain_in_the_mean_does_not_hide_a_cluster_that_loses() -> None:
    routed = np.repeat([0, 1, 2], [80, 20, 10])
    frozen, own = np.zeros(110, bool), np.zeros(110, bool)
    own[:60] = True  # cluster 0 wins 60
    frozen[80:90] = True  # cluster 1 loses 10 and wins 1
    own[90] = True
    frozen[100:104] = own[102:105] = True  # cluster 2 loses 2, wins 1: nothing is sure
    found = evaluate.by_cluster(frozen, own, routed, 4)
    assert [c["worse"] for c in found] == [False, True, False, False]
    assert found[1] == {"held_out_images": 20, "frozen": 0.5, "own": 0.05, "worse": True}
    assert found[3] == {"held_out_images": 0, "frozen": None, "own": None, "worse": False}
    table = {"frozen backbone": {"knn": 0.14}, "conditional": {"knn": 0.56}}
    first, second = evaluate.verdict(
        {"whitened": table, "held_out_images": 110, "clusters": found}, "conditional"
    ).splitlines()
    assert "+42.0 points" in first
    assert "cluster 1 is worse off" in second and "k-NN 5.0 % against 50.0 % on 20 images" in second


def test_clusters_are_measured_in_a_run(run: Run) -> None:
    written = json.loads((run.folder / "evaluation.json").read_text())
    features = evaluate.collect(run)
    images = [c["held_out_images"] for c in written["clusters"]]
    assert images == np.bincount(features.routed, minlength=run.recipe.clusters).tolist()
    for name, method in (("frozen", "frozen backbone"), ("own", run.recipe.mode)):
        mean = sum(n * c[name] for n, c in zip(images, written["clusters"], strict=True) if n) / sum(images)
        assert mean == pytest.approx(written["whitened"][method]["knn"], abs=1e-3)


def test_a_collapsed_embedding_is_measured() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    assert probe(torch.ones(4, 3), torch.ones(4, 3), labels, labels) == 0.75
