"""The simulated fleet against what queueing theory says, and against its own limits."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report as reporting
from benchmarks import simulate_fleet
from benchmarks.simulate_fleet import Levels, Run, measured, needed, simulate, traffic

SERVICE = 0.01


def run(
    rate: float, devices: int, levels: Levels = (), tenants: int = 500, zipf: float = 1.0, count: int = 20_000
) -> Run:
    return simulate(*traffic(rate, tenants, zipf, count, seed=0), tenants, devices, SERVICE, levels)


def test_traffic_is_poisson_and_zipf() -> None:
    arrivals, who = traffic(50, tenants=100, exponent=1.0, count=50_000, seed=1)
    gaps = np.diff(arrivals, prepend=0)
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.02)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.02)
    share = np.bincount(who, minlength=100) / len(who)
    assert share[0] / share[9] == pytest.approx(10, rel=0.1)
    assert who.max() < 100


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_device_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    found = run(load / SERVICE, devices=1, count=60_000)
    assert found.seconds.mean() == pytest.approx(SERVICE * (1 + load / (2 * (1 - load))), rel=0.05)
    assert found.busy == pytest.approx(load, rel=0.02)


def test_misses_are_work_like_passes() -> None:
    """Every image misses, so that it is M/D/1 with a longer service."""
    found = run(40, devices=1, levels=((0, SERVICE),), count=60_000)
    assert found.hits == (0,)
    assert found.lost == pytest.approx(0.5)
    assert found.seconds.mean() == pytest.approx(2 * SERVICE * (1 + 0.8 / (2 * (1 - 0.8))), rel=0.05)


@pytest.mark.parametrize("capacity", [10, 50, 200])
def test_hit_rate_is_that_of_an_lru(capacity: int) -> None:
    """Che's approximation: a tenant is there if it came within T, where T is such that `capacity` tenants are."""
    share = np.arange(1, 501, dtype=float) ** -1.0
    share /= share.sum()
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-share * middle)).sum() < capacity else (low, middle)
    found = run(1.0, devices=1, levels=((capacity, 0.001),), count=40_000)
    assert found.hits[0] == pytest.approx((share * (1 - np.exp(-share * low))).sum(), abs=0.01)


def test_nothing_is_lost_where_everything_fits() -> None:
    found = run(50, devices=4, levels=((500, 1.0),))
    assert (found.hits, found.lost) == ((1,), 0)
    assert found.seconds.min() == pytest.approx(SERVICE)


def test_the_smaller_level_holds_part_of_the_larger() -> None:
    found = run(50, devices=2, levels=((5, 0.001), (100, 0.01)))
    assert 0 < found.hits[0] < found.hits[1] < 1


def test_more_devices_never_make_it_slower_or_colder() -> None:
    runs = [run(150, devices, levels=((20, 0.005),)) for devices in (2, 4, 8, 16)]
    assert all(more.p99 <= less.p99 for less, more in zip(runs, runs[1:], strict=False))
    assert all(more.hits[0] >= less.hits[0] for less, more in zip(runs, runs[1:], strict=False))


def test_too_few_devices_are_seen() -> None:
    found = run(250, devices=2)
    assert found.busy > 1
    assert found.seconds[-1] > 5


def test_fewest_devices() -> None:
    assert needed(lambda devices: 1 / devices, goal=0.1) == 10
    assert needed(lambda devices: 0.0, goal=0.1) == 1
    assert needed(lambda devices: 1.0, goal=0.1) == math.inf


def test_measured_case_comes_from_the_measurements() -> None:
    case = measured()
    assert 3e6 < case.mask < 5e6
    assert 0 < case.swap < case.forward and 0 < case.cold < case.forward
    assert case.masks > 20 * case.copies  # bits against floats, less what both need


def test_figures_of_a_small_fleet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(reporting, "__file__", str(tmp_path / "report.py"))
    simulate_fleet.main(tenants=200, requests=1500, seeds=2)
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])["figures"]
    assert "assumed" in printed
    for case in ("measured", "what-if"):
        masks, copies = figures[f"{case}_devices_masks"], figures[f"{case}_devices_copies"]
        assert 1 <= masks["value"] <= 64 and 1 <= copies["value"] <= 64
        assert 0 < figures[f"{case}_hit_rate_masks"]["value"] <= 1
    assert json.loads((tmp_path / "results" / "fleet.json").read_text())["figures"] == figures
