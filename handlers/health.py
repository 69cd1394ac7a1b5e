"""Whether the server on this machine is ready, of either front end: exit status 0, as a health check wants it.

    python -m handlers.health

Ready is what TorchServe's worker says of itself: /ping is Healthy long before that, and while it crashes.
"""

import sys
from pathlib import Path
from tempfile import gettempdir

import httpx

from handlers.torchserve import tokens

PORT, MANAGEMENT_PORT = 8080, 8081


def trouble(port: int = PORT, management_port: int = MANAGEMENT_PORT) -> str | None:
    """Why the server is not ready, or None.

    Args:
        port: of the predictions. management_port: of TorchServe; nobody listens there beside the ASGI front end.
    """
    with httpx.Client(trust_env=False, timeout=4) as client:
        try:
            try:
                models = client.get(f"http://127.0.0.1:{management_port}/models/cascade", headers=_key())
            except httpx.ConnectError:
                ready = client.get(f"http://127.0.0.1:{port}/v2/health/ready")
                return None if ready.status_code == 200 else f"ASGI front end: {ready.text[:200]}"
            workers = [worker["status"] for worker in models.raise_for_status().json()[0]["workers"]]
        except (httpx.HTTPError, OSError, ValueError, LookupError) as error:
            return f"{type(error).__name__}: {error}"
    return None if "READY" in workers else f"TorchServe's workers: {', '.join(workers) or 'none'}"


def _key() -> dict[str, str]:
    """For TorchServe's management address; empty where it runs without authorization."""
    files = Path(gettempdir()).glob(f"cascade-*/{tokens.KEY_FILE}")
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    return {} if newest is None else tokens.bearer(newest.parent, "management")


if __name__ == "__main__":
    sys.exit(trouble())
