"""Metrics by bundle and by tenant, for front ends with a queue: the service that each customer gets."""

from prometheus_client import Counter, Histogram

from cascade import metrics
from cascade.engine.results import ItemError, Prediction
from cascade.engine.tenants import Tenant
from cascade.metrics_names import BusiestNames

TENANT_IMAGES = Counter(
    "cascade_tenant_images_total", "Images of a tenant: ok, or the kind of the error.", ["tenant", "outcome"]
)
TENANT_SECONDS = Histogram(
    "cascade_tenant_seconds", "Time from an image's arrival to its answer.", ["tenant"], buckets=metrics.SECONDS
)
TENANT_QUEUE_SECONDS = Histogram(
    "cascade_tenant_queue_seconds", "Time from an image's arrival to its pass.", ["tenant"], buckets=metrics.SECONDS
)
tenants = BusiestNames("tenant", [TENANT_IMAGES, TENANT_SECONDS, TENANT_QUEUE_SECONDS], metrics.MOST_NAMES)


def waited(bundle: str, tenant: Tenant, seconds: float) -> None:
    """Record the time in the queue of an image that got its pass."""
    metrics.BUNDLE_QUEUE_SECONDS.labels(metrics.bundle_label(bundle)).observe(seconds)
    if tenant.keyed:
        TENANT_QUEUE_SECONDS.labels(tenants(tenant.name)).observe(seconds)


def answered(tenant: Tenant | None, seconds: float, answer: Prediction | ItemError | None) -> None:
    """Record an image's answer and the time it took; None if the request was cancelled."""
    outcome = "cancelled" if answer is None else "ok" if isinstance(answer, Prediction) else answer.kind
    if isinstance(answer, Prediction) and answer.bundle:
        metrics.BUNDLE_SECONDS.labels(metrics.bundle_label(answer.bundle)).observe(seconds)
    if tenant is not None and tenant.keyed:
        name = tenants(tenant.name)
        TENANT_IMAGES.labels(name, outcome).inc()
        if isinstance(answer, Prediction):
            TENANT_SECONDS.labels(name).observe(seconds)
