"""``cascade serve --frontend ray``: Serve's proxies and replicas, on this machine or on the cluster of RAY_ADDRESS."""

import os
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cascade.ray_session import RayError
from handlers.ray.cluster import running
from handlers.signals import on_stop

NAME = "cascade"
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # of Serve itself; replicas write one line per request


def serve(model_store: Path | str, **options: Any) -> None:
    """Serve in the foreground until SIGTERM, Ctrl-C or SIGHUP, then drain and return. Arguments as in ``serving``."""
    stop = threading.Event()
    with serving(model_store, **options) as url:
        on_stop(stop.set)  # only now, because Ray sets its own handlers when it starts
        print(f"ready: curl -T IMAGE {url}/v1/predict\npage: {url}/ui\nmetrics: {url}/metrics", flush=True)
        stop.wait()


@contextmanager
def serving(
    model_store: Path | str,
    host: str = "127.0.0.1",
    port: int = 8080,
    replicas: int = 1,
    least: int = 1,
    api_keys: Path | None = None,
    drain_timeout: float = 8,
    pins: Mapping[str, str] | None = None,
    hosts: Collection[str] | None = None,
    keep_unknown: Path | None = None,
    **settings: Any,
) -> Iterator[str]:
    """Serve until the block ends, then drain the requests in progress; yields the URL.

    Args:
        replicas: the most; their number follows the requests in progress. least: the fewest.
        drain_timeout: seconds for the requests in progress to finish.
        hosts: Host headers to accept; None for any.
        keep_unknown: a folder in which images that fit no bundle are kept, the same on every machine.
        settings: the other fields of ``handlers.ray.replica.Settings``.

    Raises:
        ExtraError: Ray is not installed.
        RayError: Ray does not start, or no replica does.
    """
    with (
        tempfile.TemporaryDirectory(prefix="cascade-", ignore_cleanup_errors=True) as metrics,
        running(cpus=replicas + 1),
    ):
        from ray import serve as ray_serve

        from handlers.ray.replica import DEPLOYMENT, TARGET, Settings

        store = str(model_store) if "://" in str(model_store) else str(Path(model_store).resolve())
        keys = None if api_keys is None else str(api_keys.resolve())
        names = None if hosts is None else sorted(hosts)
        unknown = None if keep_unknown is None else str(keep_unknown.resolve())
        settings |= {"api_keys": keys, "pins": dict(pins or {}), "hosts": names, "keep_unknown": unknown}
        chosen = Settings(model_store=store, **settings)
        environment = {"PROMETHEUS_MULTIPROC_DIR": metrics}  # not for Ray's own processes
        if "CASCADE_EXECUTOR" in os.environ:
            environment["CASCADE_EXECUTOR"] = os.environ["CASCADE_EXECUTOR"]
        deployment = DEPLOYMENT.options(
            autoscaling_config={"min_replicas": least, "max_replicas": replicas, "target_ongoing_requests": TARGET},
            ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": environment}},
            graceful_shutdown_timeout_s=drain_timeout,
        )
        ray_serve.start(http_options={"host": host, "port": port}, logging_config=QUIET)
        try:
            try:
                ray_serve.run(deployment.bind(chosen), name=NAME, logging_config=QUIET)
            except Exception as error:
                why = " ".join(str(error).split())[-400:]
                raise RayError(f"no replica starts: {why}") from error
            yield f"http://{host}:{port}"
            ray_serve.delete(NAME)  # waits for the requests in progress
        finally:
            ray_serve.shutdown()
