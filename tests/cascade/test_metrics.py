"""Metrics in one process, and over several that share a folder and die."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cascade import metrics
from cascade.errors import CascadeError
from cascade.metrics_names import OTHER, BusiestNames
from tests.helpers.metrics import Values, now, parsed, value

ROOT = Path(metrics.__file__).parents[1]

# A worker: counts, sets its gauges, says that it is ready and waits to be told to end.
WORKER = """
import sys, time
from cascade import metrics
metrics.add_bundle("animals", "1", [0.5, 0.5])
for cluster in map(int, sys.argv[1]):
    metrics.count_answer("animals", cluster, version="1")
with metrics.stage("swap"):
    time.sleep(0.002)
metrics.MASK_HITS.inc(3)
metrics.resident({"backbones": 1, "backbone_bytes": 100, "packed_bytes": 10, "materialized_bytes": 50})
metrics.QUEUE_DEPTH.set(4)
metrics.BATCH_IMAGES.observe(8)
print("ready", flush=True)
sys.stdin.read()
"""

# One process


def test_names_types_and_units() -> None:
    found = {f.name: f.type for f in text_string_to_metric_families(metrics.scrape().decode())}
    ours = {name.removeprefix("cascade_"): kind for name, kind in found.items() if name.startswith("cascade_")}
    front_ends = {"http_seconds", "http_in_progress", "engine_restarts"}  # other tests may have imported them
    front_ends |= {"tenant_images", "tenant_seconds", "tenant_queue_seconds"}
    assert {name: kind for name, kind in ours.items() if name not in front_ends and not name.endswith("_created")} == {
        "requests": "counter",
        "stage_seconds": "histogram",
        "batch_images": "histogram",
        "group_images": "histogram",
        "mask_hits": "counter",
        "mask_misses": "counter",
        "mask_evictions": "counter",
        "dispatched": "counter",
        "unknown_kept": "counter",
        "deferred": "counter",
        "dispatch_confidence": "histogram",
        "routing_confidence": "histogram",
        "materialized_bytes": "gauge",
        "packed_bytes": "gauge",
        "backbone_bytes": "gauge",
        "backbones": "gauge",
        "feature_error": "gauge",
        "queue_depth": "gauge",
        "queue_seconds": "histogram",
        "dropped": "counter",
        "cluster_share_shift": "gauge",
        "bundle_refused": "gauge",
        "bundles": "gauge",
        "bundle_loads": "counter",
        "bundle_cold_loads": "counter",
        "bundle_evictions": "counter",
        "store_unreachable": "gauge",
        "reloads": "counter",
        "ood_score": "histogram",
        "bundle_seconds": "histogram",
        "bundle_queue_seconds": "histogram",
        "bundle_masks": "counter",
    }


def test_requests_by_bundle_cluster_and_outcome() -> None:
    metrics.add_bundle("requests-test", "1", [0.5, 0.5])
    for cluster, outcome in ((1, "ok"), (1, "ok"), (0, "ok"), (None, "not_an_image")):
        metrics.count_answer("requests-test", cluster, outcome)
    assert now("requests_total", bundle="requests-test", cluster="1", outcome="ok") == 2
    assert now("requests_total", bundle="requests-test", cluster="0", outcome="ok") == 1
    assert now("requests_total", bundle="requests-test", cluster="none", outcome="not_an_image") == 1


def test_a_bundle_without_a_hit_has_a_share_of_hits() -> None:
    metrics.count_mask("masks-test", hit=False)
    counts = {
        labels: v for (name, labels), v in parsed(metrics.scrape()).items() if name == "cascade_bundle_masks_total"
    }
    assert counts[("bundle", "masks-test"), ("result", "hit")] == 0
    assert counts[("bundle", "masks-test"), ("result", "miss")] == 1


def test_labels_stay_bounded_whatever_clients_send() -> None:
    metrics.count_answer("warm", None, "unknown_bundle")
    before = len(parsed(metrics.scrape()))
    for i in range(500):
        metrics.count_answer(f"../../etc/passwd?{i}", None, "unknown_bundle")
    text = metrics.scrape()
    assert len(parsed(text)) == before and b"passwd" not in text
    assert now("requests_total", bundle="unknown", cluster="none", outcome="unknown_bundle") >= 500


def test_labels_stay_bounded_whatever_the_store_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ten times as many bundles as there may be names."""
    monkeypatch.setattr(metrics, "_refused", {})
    monkeypatch.setattr(metrics, "bundle_label", BusiestNames("bundle", metrics._bundle_metrics, metrics.MOST_NAMES))
    names = [f"many-{i}" for i in range(10 * metrics.MOST_NAMES)]
    for name in names:
        metrics.count_dispatch(name)
        metrics.observe_ood(name, 0.5)
        metrics.refused(name)
    for metric in (metrics.DISPATCHED, metrics.OOD_SCORE, metrics.BUNDLE_REFUSED):
        labels = {sample.labels["bundle"] for family in metric.collect() for sample in family.samples}
        assert len(labels & {*names}) <= metrics.MOST_NAMES and OTHER in labels
    assert now("bundle_refused", bundle=names[0]) == now("bundle_refused", bundle=OTHER) == 1
    for name in names[metrics.MOST_NAMES :]:
        metrics.refused(name, still=False)
    assert now("bundle_refused", bundle=names[0]) == 1 and now("bundle_refused", bundle=OTHER) == 0


@pytest.mark.parametrize("name", metrics.STAGES)
def test_stage_times_its_block_and_an_error_in_it(name: str) -> None:
    count, total = now("stage_seconds_count", stage=name), now("stage_seconds_sum", stage=name)
    with metrics.stage(name):
        time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), metrics.stage(name):
        raise ZeroDivisionError
    assert now("stage_seconds_count", stage=name) - count == 2
    assert 0.02 <= now("stage_seconds_sum", stage=name) - total < 15, "seconds"


def test_stage_buckets_reach_from_half_a_millisecond_to_ten_seconds() -> None:
    bounds = [
        float(le) for le in re.findall(r'stage_seconds_bucket{le="([^"]+)",stage="swap"}', metrics.scrape().decode())
    ]
    assert (bounds[0], bounds[-2], bounds[-1]) == (0.0005, 10, float("inf"))


def test_an_unknown_stage_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        metrics.stage("lunch")


def test_resident_sets_the_gauges() -> None:
    metrics.resident({"backbones": 1, "backbone_bytes": 13, "packed_bytes": 5, "materialized_bytes": 7, "hits": 9})
    names = ("backbones", "backbone_bytes", "packed_bytes", "materialized_bytes")
    assert [now(name) for name in names] == [1, 13, 5, 7]


def test_refused_bundle() -> None:
    metrics.refused("broken/3")
    assert now("bundle_refused", bundle="broken/3") == 1
    metrics.refused("broken/3", still=False)
    assert now("bundle_refused", bundle="broken/3") == 0
    metrics.refused("never-broken", still=False)
    assert b"never-broken" not in metrics.scrape()


def test_share_shift_is_the_distance_from_training() -> None:
    metrics.add_bundle("shift-test", "1", [0.7, 0.2, 0.1])
    assert now("cluster_share_shift", bundle="shift-test", version="1") == 0
    for _ in range(20):
        metrics.count_answer("shift-test", 2, version="1")
    assert 0 < now("cluster_share_shift", bundle="shift-test", version="1") < 0.05, "twenty images are no drift"
    for _ in range(10 * metrics.WINDOW):
        metrics.count_answer("shift-test", 2, version="1")
    assert now("cluster_share_shift", bundle="shift-test", version="1") == pytest.approx(0.9, abs=1e-3)
    for _ in range(1000):  # back to the training shares
        for cluster in (0, 0, 1, 0, 0, 2, 0, 0, 1, 0):
            metrics.count_answer("shift-test", cluster, version="1")
    assert now("cluster_share_shift", bundle="shift-test", version="1") < 0.01


def test_each_version_has_its_own_drift() -> None:
    metrics.add_bundle("versions-test", "1", [0.5, 0.5])
    for _ in range(10 * metrics.WINDOW):
        metrics.count_answer("versions-test", 1, version="1")
    metrics.add_bundle("versions-test", "2", [0.0, 1.0])
    metrics.count_answer("versions-test", 1, version="2")
    assert now("cluster_share_shift", bundle="versions-test", version="1") == pytest.approx(0.5, abs=1e-3)
    assert now("cluster_share_shift", bundle="versions-test", version="2") == 0
    metrics.remove_bundle("versions-test", "1")
    assert b'share_shift{bundle="versions-test",version="1"' not in metrics.scrape()
    metrics.count_answer("versions-test", 1, version="1")  # the last one that was on its way
    assert now("requests_total", bundle="versions-test", cluster="1", outcome="ok") == 10 * metrics.WINDOW + 2


def test_errors_do_not_shift_shares() -> None:
    metrics.add_bundle("errors-test", "1", [0.5, 0.5])
    metrics.count_answer("errors-test", None, "not_an_image")
    assert now("cluster_share_shift", bundle="errors-test", version="1") == 0


def test_a_bundle_without_router() -> None:
    metrics.add_bundle("single-test", "1")
    metrics.count_answer("single-test", 0, version="1")
    assert now("requests_total", bundle="single-test", cluster="0", outcome="ok") == 1
    assert b'share_shift{bundle="single-test"' not in metrics.scrape()


def test_counting_from_many_threads_loses_nothing() -> None:
    metrics.add_bundle("threads-test", "1", [1.0])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: metrics.count_answer("threads-test", 0, version="1"), range(4000)))
    assert now("requests_total", bundle="threads-test", cluster="0", outcome="ok") == 4000


def test_serve_and_stop() -> None:
    before = threading.active_count()
    with metrics.serve() as url:
        assert url.endswith("/metrics")
        assert b"cascade_mask_hits_total" in urllib.request.urlopen(url, timeout=60).read()
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(CascadeError, match=f"{port}.*choose another port"), metrics.serve(port=port):
            pass
    end = time.monotonic() + 60
    while threading.active_count() > before:  # who answered last may still be about to end
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=60)
    with metrics.serve(port=port):
        pass  # the port is free again


# Several processes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "metrics"
    metrics.prepare_folder(path)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(path))  # what this process scrapes
    return path


@pytest.fixture
def worker(folder: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a worker that counts one image for each digit, a cluster; ends all of them."""
    started: list[subprocess.Popen[str]] = []

    def start(clusters: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, clusters],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)},
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_workers_add_up_and_gauges_of_the_killed_drop(worker: Callable[[str], subprocess.Popen[str]]) -> None:
    with metrics.serve() as url:

        def scrape() -> Values:
            return parsed(urllib.request.urlopen(url, timeout=60).read())

        first = worker("0011")
        worker("1111")
        both = scrape()
        assert value(both, "requests_total", bundle="animals", cluster="1", outcome="ok") == 6
        assert value(both, "mask_hits_total") == 6
        assert value(both, "stage_seconds_count", stage="swap") == 2
        assert value(both, "batch_images_count") == 2
        gauges = ("backbones", "backbone_bytes", "packed_bytes", "materialized_bytes", "queue_depth")
        assert [value(both, name) for name in gauges] == [2, 200, 20, 100, 8]
        shift = value(both, "cluster_share_shift", bundle="animals", version="1")
        assert shift == pytest.approx(0.5 * (1 - (1 - 1 / metrics.WINDOW) ** 4)), (
            "the worst worker's, four times cluster 1"
        )

        first.send_signal(signal.SIGKILL)
        first.wait()
        after = scrape()
        assert value(after, "requests_total", bundle="animals", cluster="1", outcome="ok") == 6
        assert value(after, "requests_total", bundle="animals", cluster="0", outcome="ok") == 2
        assert value(after, "mask_hits_total") == 6
        assert [value(after, name) for name in gauges] == [1, 100, 10, 50, 4]

        worker("0")  # the one that takes its place
        again = scrape()
        assert value(again, "requests_total", bundle="animals", cluster="0", outcome="ok") == 3
        assert [value(again, name) for name in gauges] == [2, 200, 20, 100, 8]


def test_files_of_the_dead_are_bounded_and_their_counts_kept(
    worker: Callable[[str], subprocess.Popen[str]], folder: Path
) -> None:
    def killed(clusters: str) -> None:
        process = worker(clusters)
        process.kill()
        process.wait()

    (folder / "counter_999999999.db").touch()  # died before it wrote anything
    worker("1")
    for _ in range(2):
        killed("01")
        killed("1")
        with ThreadPoolExecutor(4) as pool:
            scrapes = [parsed(text) for text in pool.map(lambda _: metrics.scrape(), range(8))]
        assert all(scrape == scrapes[0] for scrape in scrapes)
        files = sorted(re.sub("[1-9][0-9]*", "PID", file.name) for file in folder.iterdir())
        assert files == sorted(
            ["counter_0.db", "histogram_0.db", "counter_PID.db", "histogram_PID.db"]
            + ["gauge_livemax_PID.db", "gauge_livesum_PID.db"]
        )
    assert value(scrapes[0], "requests_total", bundle="animals", cluster="1", outcome="ok") == 5
    assert value(scrapes[0], "requests_total", bundle="animals", cluster="0", outcome="ok") == 2
    assert value(scrapes[0], "batch_images_count") == 5


def test_without_room_the_files_of_the_dead_stay(
    worker: Callable[[str], subprocess.Popen[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = worker("1")
    process.kill()
    process.wait()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert value(parsed(metrics.scrape()), "mask_hits_total") == 3
        assert (folder / f"counter_{process.pid}.db").exists()
    assert value(parsed(metrics.scrape()), "mask_hits_total") == 3
    assert not (folder / f"counter_{process.pid}.db").exists()


def test_prepare_folder_empties_it_of_metrics_only(
    worker: Callable[[str], subprocess.Popen[str]], folder: Path
) -> None:
    worker("0").kill()
    mine = folder / "notes.db"
    mine.write_text("not a metric")
    assert len(list(folder.iterdir())) > 1
    metrics.prepare_folder(folder)
    assert list(folder.iterdir()) == [mine]


def test_files_are_no_holes(worker: Callable[[str], subprocess.Popen[str]], folder: Path) -> None:
    """A disk that fills up later must not kill who writes into them."""
    worker("01")
    files = {file.name.rpartition("_")[0]: file.stat() for file in folder.glob("*.db")}
    assert files.keys() == {"counter", "histogram", "gauge_livesum", "gauge_livemax"}, "all that `reserve` makes"
    assert all(512 * file.st_blocks >= file.st_size >= 2**20 for file in files.values())


def test_without_room_a_worker_counts_for_itself(folder: Path) -> None:
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
from cascade import metrics
metrics.add_bundle("animals", "1", [0.5, 0.5])
metrics.count_answer("animals", 1, version="1")
print(metrics.TROUBLE)
print(metrics.scrape().decode())
"""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"no room for metrics in {folder} (File too large): free s")
    assert 'cascade_requests_total{bundle="animals",cluster="1",outcome="ok"} 1.0' in done.stdout
    assert list(folder.iterdir()) == []


def test_a_worker_makes_a_missing_folder(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "there"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from cascade import metrics; metrics.MASK_HITS.inc(); print(metrics.scrape().decode())",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(missing)},
    )
    assert "cascade_mask_hits_total 1.0" in done.stdout, done.stderr
