"""What a training costs: hours and money by hand, memory that was really held."""

import time

import numpy as np
import psutil
import pytest
import torch

from training.cost import Cost, peak_bytes


def test_time_between_entering_and_leaving() -> None:
    with Cost() as cost:
        begin = time.perf_counter()
        time.sleep(0.05)
        least = time.perf_counter() - begin
    kept = cost.seconds
    assert least <= kept
    time.sleep(0.01)
    assert cost.seconds == kept, "what comes after is not counted"
    assert "money" not in cost.facts()


def test_memory_is_in_bytes_and_only_grows() -> None:
    held = psutil.Process().memory_info().rss
    peak = peak_bytes()
    assert 0.9 * held <= peak < psutil.virtual_memory().total  # the kernel's two counts differ by some pages
    touched = np.ones(50_000_000, np.uint8)
    assert peak_bytes() >= peak and Cost().facts()["peak MB"] >= touched.nbytes // 1_000_000


def test_hours_and_money(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    cost = Cost(price=2.5)
    cost.seconds = 7200.0
    facts = cost.facts()
    assert facts["hours without a GPU"] == 2 and facts["money"] == 5, "one machine, however many processes"
    assert cost.line().startswith("cost: wall seconds 7200.0, peak MB ")


def test_every_gpu_is_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # there is none: a stand-in
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000)
    monkeypatch.setenv("WORLD_SIZE", "4")
    cost = Cost(price=2.5)
    cost.seconds = 1800.0
    assert cost.facts() | {"peak MB": 0} == {
        "wall seconds": 1800.0,
        "peak MB": 0,
        "peak GPU MB": 3,
        "GPU-hours": 2.0,
        "money": 5.0,
    }
