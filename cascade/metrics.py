"""Prometheus metrics: seconds and bytes, prefix ``cascade_``, every label bounded.

Plain metrics are module constants (``MASK_HITS.inc()``); functions are used if a label must be bounded or state
kept. With ``PROMETHEUS_MULTIPROC_DIR`` set before Python starts, every process writes to that folder, and the
process that serves /metrics (the entrypoint, not a worker) reads it: counters survive a killed worker, gauges do
not.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cascade import metrics_server
from cascade.metrics_files import (
    TROUBLE as TROUBLE,  # first: prometheus_client reads the environment when it is imported
)

# isort: split

from cascade.metrics_names import OTHER, BusiestNames

# isort: split

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from cascade.metrics_merge import alive, locked, merge_dead

STAGES = ("decode", "dispatch", "swap", "expert", "fuse")
WINDOW = 1000
"""Time constant of the served cluster shares: an image's weight falls by a factor of e after this many images."""

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SCORES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
_CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)

REQUESTS = Counter("cascade_requests_total", "Images answered.", ["bundle", "cluster", "outcome"])
STAGE_SECONDS = Histogram("cascade_stage_seconds", "Time by stage of the pass.", ["stage"], buckets=SECONDS)
BATCH_IMAGES = Histogram("cascade_batch_images", "Images in a batch.", buckets=_IMAGES)
GROUP_IMAGES = Histogram("cascade_group_images", "Images of a batch that share an expert mask.", buckets=_IMAGES)
MASK_HITS = Counter("cascade_mask_hits_total", "Needed masks that were already materialized.")
MASK_MISSES = Counter("cascade_mask_misses_total", "Masks that had to be materialized.")
MASK_EVICTIONS = Counter("cascade_mask_evictions_total", "Materialized masks that were evicted.")
QUEUE_SECONDS = Histogram("cascade_queue_seconds", "Time that an image waited for its pass.", buckets=SECONDS)
BUNDLE_SECONDS = Histogram(
    "cascade_bundle_seconds", "Time from an image's arrival to its answer, with a queue.", ["bundle"], buckets=SECONDS
)
BUNDLE_QUEUE_SECONDS = Histogram(
    "cascade_bundle_queue_seconds", "Time from an image's arrival to its pass.", ["bundle"], buckets=SECONDS
)
BUNDLE_MASKS = Counter("cascade_bundle_masks_total", "Needed masks of a bundle: hit or miss.", ["bundle", "result"])
BUNDLE_COLD_LOADS = Counter("cascade_bundle_cold_loads_total", "Loads of a bundle on demand.", ["bundle"])
DROPPED = Counter(
    "cascade_dropped_total",
    "Images that got no pass: overloaded, deadline, cancelled, stopping, or over a limit of their tenant.",
    ["why"],
)
for _why in ("overloaded", "over_rate", "over_concurrency", "over_queue", "deadline", "cancelled", "stopping"):
    DROPPED.labels(_why)  # exists from the start, as zero
ROUTING_CONFIDENCE = Histogram("cascade_routing_confidence", "Calibrated p(cluster).", buckets=_CONFIDENCES)
DISPATCHED = Counter(
    "cascade_dispatched_total",
    "Images that named no bundle, by the one that answered (unknown: none fits).",
    ["bundle"],
)
UNKNOWN_KEPT = Counter(
    "cascade_unknown_kept_total",
    "Images that fit no bundle, with --keep-unknown: kept, repeated, dropped (too many at a time) or failed.",
    ["result"],
)
DEFERRED = Counter(
    "cascade_deferred_total",
    "Images of a bundle with two input sizes that were deferred to the larger one.",
    ["bundle"],
)
DISPATCH_CONFIDENCE = Histogram(
    "cascade_dispatch_confidence", "Calibrated p(bundle) of images that named none.", buckets=_CONFIDENCES
)
OOD_SCORE = Histogram(
    "cascade_ood_score",
    "Out-of-domain score, a percentile among the training images: uniform without drift.",
    ["bundle"],
    buckets=_SCORES,
)


def _gauge(name: str, text: str, labels: Sequence[str] = (), mode: Literal["livesum", "livemax"] = "livesum") -> Gauge:
    return Gauge(f"cascade_{name}", text, labels, multiprocess_mode=mode)


MATERIALIZED_BYTES = _gauge("materialized_bytes", "Resident materialized weights, all workers.")
PACKED_BYTES = _gauge("packed_bytes", "Resident bundles (packed masks, router, fusion, heads), all workers.")
BACKBONE_BYTES = _gauge("backbone_bytes", "Resident backbones, all workers.")
BACKBONES = _gauge("backbones", "Number of resident backbones, all workers.")
FEATURE_ERROR = _gauge(
    "feature_error",
    "Largest relative error of a resident backbone's features against plain float32, when its executor was chosen.",
    mode="livemax",
)
QUEUE_DEPTH = _gauge("queue_depth", "Images waiting for a pass, all workers.")
CLUSTER_SHARE_SHIFT = _gauge(
    "cluster_share_shift",
    "Total-variation distance, 0 to 1, of the cluster shares served from those trained on; worst worker.",
    ["bundle", "version"],
    "livemax",
)
BUNDLE_REFUSED = _gauge(
    "bundle_refused", "1 for a bundle of which a version in the store could not be loaded.", ["bundle"], "livemax"
)
BUNDLES = _gauge(
    "bundles", "Bundles of the store by state: ready, stored, loading, refused, removed.", ["state"], "livemax"
)
BUNDLE_LOADS = Counter("cascade_bundle_loads_total", "Names that were loaded on demand.")
BUNDLE_EVICTIONS = Counter("cascade_bundle_evictions_total", "Names that were evicted to free memory.")
STORE_UNREACHABLE = _gauge("store_unreachable", "1 while the model store can't be read.", mode="livemax")
RELOADS = Counter("cascade_reloads_total", "Checks of the store: changed, unchanged or failed.", ["outcome"])

_STAGES = {name: STAGE_SECONDS.labels(name) for name in STAGES}


@dataclass
class _Shares:
    """Cluster shares of one bundle: in training, and served recently."""

    trained: tuple[float, ...]
    served: list[float]

    def add(self, cluster: int) -> float:
        """Count one image, and return the total-variation distance between the two."""
        for k, share in enumerate(self.served):
            self.served[k] = share + ((k == cluster) - share) / WINDOW
        return sum(abs(s - t) for s, t in zip(self.served, self.trained, strict=True)) / 2


MOST_NAMES = 100
"""Most bundles, and most tenants, with their own labels; the rest are ``other``."""
_bundle_metrics = (
    REQUESTS,
    OOD_SCORE,
    CLUSTER_SHARE_SHIFT,
    BUNDLE_SECONDS,
    BUNDLE_QUEUE_SECONDS,
    BUNDLE_MASKS,
    BUNDLE_COLD_LOADS,
    DISPATCHED,
    DEFERRED,
)
bundle_label = BusiestNames("bundle", _bundle_metrics, MOST_NAMES)

_serving: dict[tuple[str, str], _Shares] = {}
_refused: dict[str, bool] = {}
_lock = threading.Lock()


def add_bundle(bundle: str, version: str, shares: Sequence[float] = ()) -> None:
    """Give a bundle a label; ``shares`` are its clusters' shares in training (empty without a router).

    The served shares start at those of training, so that the first few images do not raise an alarm.
    """
    with _lock:
        _serving[bundle, version] = _Shares(tuple(shares), list(shares))
    if shares and bundle_label.has_own(bundle):
        CLUSTER_SHARE_SHIFT.labels(bundle, version).set(0)


def remove_bundle(bundle: str, version: str) -> None:
    """Forget a bundle's cluster shares, and reset its drift."""
    with _lock:
        shares = _serving.pop((bundle, version), None)
    if shares and shares.trained and bundle_label.has_own(bundle):
        CLUSTER_SHARE_SHIFT.labels(bundle, version).set(0)  # prometheus_client can't remove it from shared files
        if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            CLUSTER_SHARE_SHIFT.remove_by_labels({"bundle": bundle, "version": version})


def refused(bundle: str, still: bool = True) -> None:
    """Record that a version of a bundle in the store was refused; not ``still``: none is refused any more.

    ``bundle`` comes from the store, never from a client. After the first hundred, all others are one: ``other``.
    """
    if not still and bundle not in _refused:
        return
    _refused[bundle] = still
    if bundle in [*_refused][:MOST_NAMES]:
        BUNDLE_REFUSED.labels(bundle).set(still)
    else:
        BUNDLE_REFUSED.labels(OTHER).set(any([*_refused.values()][MOST_NAMES:]))


def count_answer(bundle: str | None, cluster: int | None, outcome: str = "ok", *, version: str | None = None) -> None:
    """Count one answer.

    Args:
        bundle: its name. A name that is not served counts as "unknown", because the client chose it.
        cluster: None for an error.
        outcome: "ok", or the kind of the error.
        version: of the bundle that answered; None for an error.
    """
    with _lock:
        shares = _serving.get((bundle or "", version or ""))
        known = shares is not None or any(name == bundle for name, _ in _serving)
        label = bundle_label(bundle) if known and bundle is not None else "unknown"
        if shares and cluster is not None and cluster < len(shares.served):
            shift = shares.add(cluster)
            if label == bundle:
                CLUSTER_SHARE_SHIFT.labels(bundle, version).set(shift)
    REQUESTS.labels(label, "none" if cluster is None else str(cluster), outcome).inc()


def count_cold_load(bundle: str) -> None:
    """Count a bundle that was loaded on demand."""
    BUNDLE_LOADS.inc()
    BUNDLE_COLD_LOADS.labels(bundle if bundle_label.has_own(bundle) else OTHER).inc()


def count_mask(bundle: str | None, hit: bool) -> None:
    """Count a needed mask of a served bundle (None: of no bundle)."""
    (MASK_HITS if hit else MASK_MISSES).inc()
    if bundle is not None:
        label = bundle_label(bundle)
        BUNDLE_MASKS.labels(label, "hit").inc(hit)  # create both series at once, since a ratio needs both
        BUNDLE_MASKS.labels(label, "miss").inc(not hit)


def count_dispatch(bundle: str | None, confidence: float = 0.0) -> None:
    """Count one dispatched image. bundle: the one that answered; None: it fits none."""
    DISPATCHED.labels("unknown" if bundle is None else bundle_label(bundle)).inc()
    if bundle is not None:
        DISPATCH_CONFIDENCE.observe(confidence)


def count_deferral(bundle: str, deferred: bool) -> None:
    """Count one image of a bundle with two input sizes; the series exists from the first image on, for ratios."""
    DEFERRED.labels(bundle_label(bundle)).inc(deferred)


def observe_ood(bundle: str, score: float) -> None:
    """Record the out-of-domain score of an answer."""
    OOD_SCORE.labels(bundle_label(bundle)).observe(score)


def stage(name: str) -> AbstractContextManager[object]:
    """Time one of STAGES: ``with stage("swap"): ...``."""
    return _STAGES[name].time()


def stage_seconds() -> dict[str, float]:
    """Seconds that this process has spent in each of STAGES so far, summed over threads."""
    samples = [sample for metric in STAGE_SECONDS.collect() for sample in metric.samples]
    return {s.labels["stage"]: s.value for s in samples if s.name.endswith("_sum")}


def resident(stats: Mapping[str, int]) -> None:
    """Set the gauges of resident memory from ``Engine.stats()``."""
    for name, gauge in (
        ("backbones", BACKBONES),
        ("backbone_bytes", BACKBONE_BYTES),
        ("packed_bytes", PACKED_BYTES),
        ("materialized_bytes", MATERIALIZED_BYTES),
    ):
        gauge.set(stats[name])


def prepare_folder(path: Path) -> None:
    """Create the multiprocess folder and delete an earlier run's files; call it before any worker starts."""
    path.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir():
        if re.fullmatch(r"(counter|gauge_[a-z]+|histogram|summary)_\d+\.db", file.name):
            file.unlink()


def scrape() -> bytes:
    """All metrics in Prometheus' text format; with a multiprocess folder, of all processes."""
    return generate_latest(_registry())


def serve(
    host: str = "127.0.0.1", port: int = 0, allowed: Callable[[str], bool] | None = None
) -> AbstractContextManager[str]:
    """Serve /metrics until the block ends; yields the URL. Port 0 takes a free one.

    It must run in the workers' PID namespace, or their gauges are dropped as those of dead processes.

    Args:
        allowed: whether an Authorization header may read the metrics; None lets everybody.

    Raises:
        CascadeError: the address is taken, or not one of this machine.
    """
    return metrics_server.serve(scrape, host, port, allowed)


class _Living(MultiProcessCollector):
    """The multiprocess folder, without the gauges of processes that were killed (SIGKILL)."""

    def collect(self) -> Iterator[Metric]:
        folder = Path(self._path)
        with locked(folder):
            for file in folder.glob("gauge_live*_*.db"):
                if not alive(file):
                    mark_process_dead(int(file.stem.rpartition("_")[2]), self._path)
            merge_dead(folder)
            metrics = [*super().collect()]
        yield from metrics


def _registry() -> CollectorRegistry:
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return REGISTRY
    merged = CollectorRegistry()
    _Living(merged, folder)
    return merged
