"""The ASGI application in this process: requests without a network, and what tests read from the answers."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np

from cascade import Engine, Options, Prediction
from cascade.open_inference import LENGTH_HEADER, packed, unpacked
from handlers.asgi.middleware import Guard, Limits

LIMITS = Limits(body=200_000, bodies=300_000, images=8)
Ask = Callable[..., httpx.Response]


def client(guard: Guard) -> Ask:
    """Requests without a network. An answer must name its request, and an error have one line."""

    def ask(method: str, path: str, **options: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://test") as http:
                return await http.request(method, path, **options)

        answer = asyncio.run(go())
        assert answer.headers["x-request-id"]
        assert guard.requests == guard.body_bytes == 0
        return answer

    return ask


def error(answer: httpx.Response) -> tuple[int, str]:
    """Status and kind, of either form."""
    body = answer.json()["error"]
    if isinstance(body, str):
        return answer.status_code, body.partition(":")[0]
    assert body["status"] == answer.status_code and "\n" not in body["message"]
    return answer.status_code, body["kind"]


def expected(engine: Engine, files: list[bytes], **wishes: Any) -> list[Prediction]:
    found = engine.predict(files, Options(embedding=True, **wishes))
    assert all(isinstance(each, Prediction) for each in found)
    return found  # type: ignore[return-value]


# --- Open Inference Protocol


def binary(files: list[bytes], **more: Any) -> dict[str, Any]:
    """A request whose images and answers are binary data."""
    data = packed(files)
    about = {"name": "image", "shape": [len(files)], "datatype": "BYTES"}
    inputs = [about | {"parameters": {"binary_data_size": len(data)}}]
    text = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}} | more).encode()
    return {"content": text + data, "headers": {LENGTH_HEADER: str(len(text))}}


def outputs(answer: httpx.Response) -> dict[str, Any]:
    """Each output as an array, or a list of texts."""
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get(LENGTH_HEADER, len(answer.content)))
    rest, found = answer.content[length:], {}
    for output in json.loads(answer.content[:length])["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        data, rest = (None, rest) if size is None else (rest[:size], rest[size:])
        kind = {"INT64": "<i8", "FP32": "<f4", "BOOL": "?"}.get(output["datatype"])
        if kind is None:
            texts = output["data"] if data is None else [b.decode() for b in unpacked(data)]
            found[output["name"]] = texts
        else:
            flat = np.asarray(output["data"], kind) if data is None else np.frombuffer(data, kind)
            found[output["name"]] = flat.reshape(output["shape"])
    assert rest == b""
    return found
