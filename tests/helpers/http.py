"""Requests over HTTP to a server of either front end, and their answers."""

import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from PIL import Image

import cascade
from cascade import Engine
from tests.helpers.servers import CLIENT, Running


def post(server: Running, body: bytes, **headers: str) -> httpx.Response:
    """One request; `X_Cascade_Mode="dispatcher"` and so on are headers."""
    named = {"Content-Type": "image/png"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return CLIENT.post(server.url, content=body, headers=server.headers | named)


def answer(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return dict(response.json())


def error(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()["error"]
    assert body["status"] == response.status_code
    assert body["message"] and "\n" not in body["message"]
    return response.status_code, body["kind"]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Equal in everything that is said, numbers to float tolerance."""
    if a.keys() != b.keys():
        return False
    pairs = [(a[key], b[key]) for key in a]
    return all(
        same_list(x, y) if isinstance(x, list) else abs(x - y) < 1e-3 if isinstance(x, float) else x == y
        for x, y in pairs
    )


def same_list(a: list[Any], b: list[Any]) -> bool:
    if len(a) != len(b):
        return False
    if a and isinstance(a[0], dict):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b if a and isinstance(a[0], str) else bool(np.allclose(a, b, atol=1e-3))


def encoded(image: Image.Image, kind: str, size: tuple[int, int] | None = None) -> bytes:
    """The image as a file, at another size if one is given."""
    out = io.BytesIO()
    (image.resize(size) if size else image).save(out, kind)
    return out.getvalue()


def lone(server: Running, engine: Engine, photo: bytes) -> float:
    """Seconds that a server adds to the engine's time for one request after the other; of a busy machine, the best."""

    def median(call: Callable[[], object]) -> float:
        times = []
        for _ in range(40):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times[10:])

    headers = server.headers | {"Content-Type": "image/png", "X-Cascade-Bundle": "one", "X-Cascade-Mode": "dispatcher"}
    added: list[float] = []
    while len(added) < 10 and min(added, default=1) >= 0.05:
        bare = median(lambda: engine.predict([photo], cascade.Options(mode="dispatcher")))
        over_http = median(lambda: CLIENT.post(server.url, content=photo, headers=headers).raise_for_status())
        print(f"lone request: engine {1000 * bare:.1f} ms, over HTTP {1000 * over_http:.1f} ms")
        added.append(over_http - bare)
    return min(added)
