"""Metrics of the ASGI front end itself; those of images and masks are in ``cascade.metrics``."""

from prometheus_client import Counter, Gauge, Histogram

from cascade.metrics import SECONDS

HTTP_SECONDS = Histogram(
    "cascade_http_seconds", "Time of a request to the ASGI front end.", ["route", "status"], buckets=SECONDS
)
HTTP_IN_PROGRESS = Gauge(
    "cascade_http_in_progress", "Requests to the ASGI front end in progress.", multiprocess_mode="livesum"
)
ENGINE_RESTARTS = Counter("cascade_engine_restarts_total", "Deaths of the engine process behind the ASGI front end.")
