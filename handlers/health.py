"""A health check: exit status 0 if the server on this machine, of either front end, is ready.

    python -m handlers.health     asks port 8080, or that of PORT or CASCADE_SERVE_PORT, which serve reads, too

It asks by HTTPS if CASCADE_SERVE_TLS_CERT is set. TorchServe counts as ready when its worker does: /ping says Healthy
long before that, and while the worker crashes.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import Literal

import httpx

from handlers.torchserve import tokens

PORT, MANAGEMENT_PORT = 8080, 8081


def not_ready_reason(
    port: int = PORT, management_port: int = MANAGEMENT_PORT, scheme: Literal["http", "https"] = "http"
) -> str | None:
    """Why the server is not ready, or None.

    Args:
        port: of the predictions. management_port: of TorchServe; the ASGI front end has none.
        scheme: of the ASGI front end.
    """
    # The certificate is for another name than 127.0.0.1, and nothing secret is sent.
    with httpx.Client(trust_env=False, timeout=4, verify=False) as client:
        try:
            try:
                models = client.get(f"http://127.0.0.1:{management_port}/models/cascade", headers=_key())
            except httpx.ConnectError:
                ready = client.get(f"{scheme}://127.0.0.1:{port}/v2/health/ready")
                return None if ready.status_code == 200 else f"ASGI front end: {ready.text[:200]}"
            workers = [worker["status"] for worker in models.raise_for_status().json()[0]["workers"]]
        except (httpx.HTTPError, OSError, ValueError, LookupError) as error:
            return f"{type(error).__name__}: {error}"
    return None if "READY" in workers else f"TorchServe's workers: {', '.join(workers) or 'none'}"


def _key() -> dict[str, str]:
    """The header for TorchServe's management address; empty if it runs without authorization."""
    files = Path(gettempdir()).glob(f"cascade-*/{tokens.KEY_FILE}")
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    return {} if newest is None else tokens.bearer(newest.parent, "management")


def port_of(environment: Mapping[str, str]) -> int:
    """The port for serve; ignores the address that Kubernetes sets for a Service named cascade-serve."""
    given = (environment.get(name, "") for name in ("PORT", "CASCADE_SERVE_PORT"))
    return next((int(port) for port in given if port.isdecimal()), PORT)


if __name__ == "__main__":
    secure = os.environ.get("CASCADE_SERVE_TLS_CERT")
    sys.exit(not_ready_reason(port_of(os.environ), scheme="https" if secure else "http"))
