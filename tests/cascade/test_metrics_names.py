"""Names as labels: bounded, and the busiest among them."""

from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, Counter

from cascade.metrics_names import PERIOD, BusiestNames


@pytest.fixture
def counter() -> Iterator[Counter]:
    counter = Counter("names_test", "For this test.", ["name", "what"])
    yield counter
    REGISTRY.unregister(counter)


def series(counter: Counter) -> dict[str, float]:
    """The counts by name."""
    samples = [sample for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total")]
    return {sample.labels["name"]: sample.value for sample in samples}


def test_any_number_of_names_takes_a_bounded_number_of_labels(counter: Counter) -> None:
    names = BusiestNames("name", [counter], most=3)
    for i in range(20 * PERIOD):
        counter.labels(names(f"name-{i % 500}"), "x").inc()
    assert len(series(counter)) <= 4 and "other" in series(counter)
    assert len(names._others) <= 500


def test_the_busiest_have_names_and_no_counter_ever_falls(counter: Counter) -> None:
    names = BusiestNames("name", [counter], most=2)
    before: dict[str, float] = {}
    for i in range(6 * PERIOD):
        counter.labels(names("early-1"), "x").inc()
        for name in () if i < PERIOD else ("busy-1", "busy-1", "busy-1", "busy-2", "busy-2", "busy-2", f"rare-{i}"):
            counter.labels(names(name), "x").inc()
        now = series(counter) if i % 100 == 0 else before
        assert all(now[name] >= before[name] for name in now.keys() & before.keys())
        before = now
    assert series(counter).keys() == {"busy-1", "busy-2", "other"}


def test_a_label_of_its_own_while_there_is_one(counter: Counter) -> None:
    names = BusiestNames("name", [counter], most=2)
    assert names.has_own("a") and names("b") == "b"
    assert not names.has_own("c") and names("c") == "other" and names("a") == "a"


def test_series_of_several_processes_keep_their_names(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """prometheus_client can't remove them from shared files, so others would add up without end."""
    names = BusiestNames("name", [counter], most=1)
    names("first")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")
    assert {names("second") for _ in range(3 * PERIOD)} == {"other"}
