"""The frontier's lean tail against the trainer's, its closed forms against plain ones, its choices on known results."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.frontier import learn, plane, within
from benchmarks.frontier.lean import Tail
from benchmarks.frontier.learn import Budget
from benchmarks.frontier.methods import FAIR_TAIL, METHODS, ROUTED_TAIL
from benchmarks.frontier.sets import Set
from benchmarks.frontier.study import Study
from cascade.model import backbone as backbones
from training.masking import mask_backbone


@pytest.fixture(scope="module")
def tail() -> Tail:
    backbone = backbones.load("tf_efficientnet_lite0", "random:0")
    return Tail(backbone, backbone.stage("blocks.6"))


@pytest.fixture(scope="module")
def data() -> Set:
    """Two domains of two classes each: noise around four directions."""
    draw = torch.Generator().manual_seed(0)
    labels = np.arange(96) % 4
    centres = torch.randn(4, 4, 192, generator=draw)
    maps = (centres[labels] + 0.5 * torch.randn(5, 96, 4, 192, generator=draw)).half()
    return Set("noise", maps[:4].transpose(0, 1), maps[4], maps[0, :30], labels, labels[:30], labels // 2, labels[:30])


@pytest.fixture
def study(tail: Tail, data: Set, tmp_path: Path) -> Study:
    return Study(data, tail, 0, Budget(dispatcher=4, expert=2, experts=2, distil=2), tmp_path)


@pytest.mark.parametrize(
    "name, first, width, side",
    [
        ("tf_efficientnet_lite0", "blocks.6", 192, 2),
        ("tf_efficientnet_lite0", "blocks.5", 112, 4),
        ("mobilenetv2_100", "blocks.4", 64, 4),
    ],
)
def test_the_lean_tail_has_the_trainers_features_and_gradients(name: str, first: str, width: int, side: int) -> None:
    backbone = backbones.load(name, "random:0")
    stage, draw = backbone.stage(first), torch.Generator().manual_seed(1)
    lean, model = Tail(backbone, stage), mask_backbone(backbone, stage)
    lean.precise = True
    assert list(lean.scores) == list(model.scores)
    scores = {n: 1 + torch.randn(p.shape, generator=draw) for n, p in lean.scores.items()}
    lean.load(scores)
    model.load(scores, {})
    x = torch.randn(8, width, side, side, generator=draw)
    ours, theirs = lean(x.flatten(2).transpose(1, 2)), model.tail(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.randn(ours.shape, generator=draw)
    mine = torch.autograd.grad((ours * weights).sum(), list(lean.scores.values()))
    reference = torch.autograd.grad((theirs * weights).sum(), list(model.scores.values()))
    for a, b in zip(mine, reference, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-3


def test_a_mask_that_was_trained_is_read_back_and_rate_zero_changes_nothing(study: Study) -> None:
    first = study.dispatcher()
    again = Study(study.data, study.tail, 0, study.budget, study.folder).dispatcher()
    assert all(torch.equal(first[n], again[n]) for n in first)
    study.swav("zero-rate", 3, lr=0.0)
    assert all(torch.equal(a, b) for a, b in zip(study.features("zero-rate"), study.frozen, strict=True))
    study.swav("moved", 4, lr=0.6)
    assert not torch.equal(study.features("moved")[0], study.frozen[0])


def test_each_image_has_the_features_of_the_mask_that_it_is_sent_to(study: Study) -> None:
    study.dispatcher()
    study.swav("other", 4, lr=0.6)
    choice = study.data.domain, study.data.held_out_domain % 2
    picked = study.pick(["dispatcher", "other"], choice)
    for split in (0, 1):
        both = torch.stack([study.features(n)[split] for n in ("dispatcher", "other")])
        wanted = both[torch.from_numpy(choice[split]), torch.arange(both.shape[1])]
        torch.testing.assert_close(picked[split].float(), wanted.float(), rtol=0.02, atol=0.02)


def test_experts_trained_together_are_one_mask_at_twice_the_rate_where_there_is_one_cluster(study: Study) -> None:
    start, every = study.dispatcher(), torch.zeros(study.data.augmented.shape[:2], dtype=torch.int64)
    (alone,) = learn.together(study.tail, study.data, 3, 7, every, 1, start, lr=0.3)
    plain = learn.swav(study.tail, study.data, 3, 7, start=start, lr=0.6)
    assert not torch.equal(plain["conv_head.weight"], start["conv_head.weight"])
    for name in plain:
        torch.testing.assert_close(alone[name], plain[name], rtol=1e-3, atol=1e-3)


def test_experts_trained_together_differ_where_their_views_do(study: Study) -> None:
    start = study.dispatcher()
    route = torch.from_numpy(study.data.domain)[:, None].repeat(1, 4)
    first, second = learn.together(study.tail, study.data, 3, 7, route, 2, start, lr=0.3)
    assert not torch.equal(first["conv_head.weight"], second["conv_head.weight"])
    assert torch.equal(first["prototypes"], second["prototypes"])
    route[:] = 1  # an expert that no view goes to has what all share, the other twice that
    unused, used = learn.together(study.tail, study.data, 3, 7, route, 2, start, lr=0.3)
    moved = unused["conv_head.weight"] - start["conv_head.weight"]
    assert bool(moved.any())
    torch.testing.assert_close(used["conv_head.weight"] - start["conv_head.weight"], 2 * moved)
    assert study.route_views(2).shape == study.data.augmented.shape[:2]


def test_a_head_of_its_own_begins_anew_and_the_scores_do_not(study: Study) -> None:
    start = study.dispatcher()
    own = learn.swav(study.tail, study.data, 1, 7, start=start, own_head=True, lr=0.0)
    assert all(torch.equal(own[n], start[n]) for n in study.tail.scores)
    assert not torch.allclose(own["prototypes"], start["prototypes"], atol=0.1)


def test_a_cluster_takes_the_other_tail_where_it_is_worse_off_with_the_first(tail: Tail, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = np.arange(240) % 4
    domain = labels // 2
    signs = torch.nn.functional.one_hot(torch.from_numpy(labels), 4).float()

    def of(seen: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features that tell the labels of these domains apart, and no others."""
        clear = torch.from_numpy(np.isin(domain, seen))[:, None]
        pair = [torch.where(clear, signs, 0.5) + 0.05 * torch.randn(240, 4, generator=draw) for _ in range(2)]
        return pair[0], pair[1]

    maps = torch.zeros(240, 4, 192).half()
    study = Study(Set("", maps[:, None], maps, maps, labels, labels, domain, domain), tail, 0, Budget(), tmp_path)
    first, second = of((0,)), of((1,))
    picked = study.unharmed(first, second, (domain, domain))
    for split in (0, 1):
        wanted = torch.where(torch.from_numpy(domain == 1)[:, None], second[split], first[split])
        assert torch.equal(picked[split], wanted)
    same = study.unharmed(second, of((1,)), (domain, domain))
    assert torch.equal(same[1], second[1]), "no worse is no harm"


def test_an_expert_is_compared_on_its_own_cluster(study: Study) -> None:
    study.swav("unrouted", 2, start=study.dispatcher())
    found = within.clusters(study, study.frozen)
    routed = np.bincount(study.assigned(2)[1][~study.data.validation], minlength=2)
    assert [n for n, _, _ in found] == [n for n in routed if n] and all(0 <= k <= 100 for _, k, _ in found)
    assert within.average([(10, 50.0, 40.0), (30, 70.0, 80.0)]) == (65.0, 70.0)
    scores = {"experts": [(9, 60.0, 50.0), (9, 60.0, 50.0)], "on everything": [(9, 50.0, 60.0), (9, 60.0, 40.0)]}
    assert within.better([scores, scores]) == "2  2 of 4"


def test_the_distance_of_distillation() -> None:
    draw = torch.Generator().manual_seed(0)
    wanted = torch.randn(16, 8, generator=draw)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q
    assert learn.distance(torch.cat([wanted, 3 * wanted]), wanted) < 1e-6  # lengths don't count
    turned = learn.distance(wanted @ turn, wanted)  # all relations are kept
    assert 0.3 < turned < learn.distance(wanted[torch.randperm(16, generator=draw)], wanted)


def test_distillation_keeps_what_routes_and_trains_mask_and_map(study: Study) -> None:
    start = study.dispatcher()
    targets = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    fitted = study.distil("fitted", 0, lambda: targets, start)
    trained = study.distil("trained", 3, lambda: targets, start, rows=np.arange(40), others=0.25)
    assert all(torch.equal(start[n], trained[n]) for n in ("head.weight", "head.bias", "prototypes"))
    assert all(torch.equal(start[n], fitted[n]) for n in study.tail.scores)
    assert not any(torch.equal(trained[n], fitted[n]) for n in (*study.tail.scores, "map", "map.bias"))
    weight, bias = learn.ridge(study.features("dispatcher")[0].float(), targets)
    torch.testing.assert_close(fitted["map"], weight, rtol=0.1, atol=0.1 * float(weight.abs().max()))
    torch.testing.assert_close(fitted["map.bias"], bias, rtol=0.1, atol=0.2)


def test_the_dual_regression_is_the_plain_one(study: Study) -> None:
    draw = torch.Generator().manual_seed(0)
    block = torch.randn(96, 20, generator=draw), torch.randn(30, 20, generator=draw)
    targets = torch.randn(96, 3, generator=draw)
    weight, bias = learn.ridge(block[0], targets)
    for found, x in zip(study.regressed(targets, block, None), block, strict=True):
        torch.testing.assert_close(found, x @ weight + bias, rtol=1e-3, atol=1e-3)


def test_fusions_of_clusters_share_no_dimension(study: Study) -> None:
    draw = torch.Generator().manual_seed(0)
    block = torch.randn(96, 20, generator=draw), torch.randn(30, 20, generator=draw)
    choice = study.data.domain, study.data.held_out_domain % 2
    for wide, c in zip(study.fused_apart(choice, block), choice, strict=True):
        used = wide != 0
        assert not (used[c == 0].any(dim=0) & used[c == 1].any(dim=0)).any()
        assert used[c == 0].any() and used[c == 1].any()


def test_the_control_is_the_best_of_equal_cost_and_training_by_validation() -> None:
    def result(method: str, seed: int) -> dict[str, object]:
        served = {"conditional, one slot": 71.0 + seed, "two masks, no routing": 70.0, "unconditional": 74.0}
        served |= {ROUTED_TAIL: 61.5, FAIR_TAIL: 61.0}
        tested = served.get(method, 60.0)
        value = {"knn": tested, "probe": tested}
        # On the validation images the dispatcher of all steps is the best control, whatever the test images say.
        seen = value if method != "dispatcher, all steps" else {"knn": 72.0, "probe": 70.5}
        return {"validation": seen, "test": value, "steps": METHODS[method].steps(Budget())}

    results = {("b", "s", seed): {m: result(m, seed) for m in METHODS} for seed in (0, 1, 2)}
    ways = {"one mask": 1.0, "two masks": 1.2, "dispatcher and routed expert": 1.3, "dispatcher and five experts": 2.1}
    cost = {"share": 0.13, "time": {"64": {way: [value, value, value] for way, value in ways.items()}}}
    found, cheap, routed, control = plane.figures(results, cost)
    assert (cheap, routed, control) == ("unconditional", "conditional, one slot", "dispatcher, all steps")
    assert found["gap_to_six_passes"].value == 0 and found["gap_to_six_passes"].met
    assert found["routed_minus_control"].value == pytest.approx(12.0)
    assert found["routed_minus_control"].spread == (11.0, 13.0)
    assert found["routed_tail_minus_control"].value == found["routed_tail_minus_control_s"].value == 0.5
    assert found["routed_minus_control_sd"].value == pytest.approx(12.0)
