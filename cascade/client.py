"""A client for both front ends: files in, and the same ``Prediction`` out as from the engine.

with cascade.Client("http://127.0.0.1:8080") as client:
    print(client.predict("cat.jpg").cluster)
"""

import json
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import numpy as np

from cascade.engine.results import ItemError, Options, Prediction
from cascade.errors import CascadeError
from cascade.open_inference import LENGTH_HEADER, NUMPY, OUTPUTS, packed, unpacked

T = TypeVar("T")
Image = bytes | str | Path
LONGEST_PAUSE = 5.0  # seconds between two tries
LOOPBACK = ("127.0.0.1", "::1", "localhost")  # this machine, which the environment's proxy can't reach


class ClientError(CascadeError):
    """The server cannot be reached, or its answer is not valid."""


class Client:
    """One server, with one connection per thread that uses the client.

    Args:
        url: of the server. If it has a path, images are posted there, like ``http://HOST:8080/predictions/cascade`` for
            TorchServe; otherwise to ``/v1/predict``.
        key: API key, sent as a header.
        timeout: seconds for one request.
        patience: seconds to retry while the server is overloaded or down, or the key's limit is reached; a request may
            be sent twice.
        ca: PEM file of the authorities that may have signed the server's certificate (a self-signed one is its own);
            None for those that everybody trusts.

    Raises:
        ClientError: ``ca`` cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 60,
        patience: float = 0,
        ca: str | Path | None = None,
    ) -> None:
        address = httpx.URL(url)
        self._predict = address.path if address.path != "/" else "/v1/predict"
        self.patience = patience
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        proxied = address.host not in LOOPBACK
        root = address.copy_with(path="/")
        trusted = True if ca is None else _trusted(ca)
        self._http = httpx.Client(base_url=root, headers=headers, timeout=timeout, trust_env=proxied, verify=trusted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def predict(self, image: Image, options: Options = Options()) -> Prediction | ItemError:
        """Predict one image: its answer, or its error; at most five labels and neighbors.

        Raises:
            ClientError: there is no valid answer.
        """
        fields = [name for name in ("labels", "neighbors", "embedding") if getattr(options, name)]
        headers = {"Content-Type": b"application/octet-stream", "X-Cascade-Fields": ",".join(fields).encode()}
        for name in ("bundle", "version", "mode", "priority", "dispatch", "unknown"):
            if (value := getattr(options, name)) is not None:
                headers[f"X-Cascade-{name}"] = str(value).encode()  # UTF-8: names may be in any script
        answer = self._ask("POST", self._predict, content=_read(image), headers=headers)
        if not _good(answer):
            return _error(answer)
        prediction = _understood(answer, lambda: Prediction.from_json(answer.json()))
        labels, neighbors = prediction.labels[: options.labels], prediction.neighbors[: options.neighbors]
        return replace(prediction, labels=labels, neighbors=neighbors)

    def infer(
        self,
        images: Sequence[Image] | np.ndarray,
        bundle: str,
        version: str | None = None,
        mode: str | None = None,
        outputs: Sequence[str] = tuple(OUTPUTS),
    ) -> dict[str, Any]:
        """Predict many images in one request of the Open Inference Protocol (ASGI front end only).

        Args:
            images: files, or float32 [N, 3, H, W], preprocessed.
            outputs: some of ``cascade.open_inference.OUTPUTS``; with the bundle ``auto`` also of ``AUTO_OUTPUTS``, and
                with two input sizes also of ``DEFERRAL_OUTPUTS``.

        Returns:
            Each output by name, as an array with one row per image or a list of strings; and the ``version`` that
            answered. Images whose ``error`` is not empty have no answer.

        Raises:
            ClientError: there is no valid answer, or the request as a whole was refused.
        """
        if isinstance(images, np.ndarray):
            about: dict[str, Any] = {"name": "pixels", "shape": list(images.shape), "datatype": "FP32"}
            data = images.astype(NUMPY["FP32"]).tobytes()
        else:
            about = {"name": "image", "shape": [len(images)], "datatype": "BYTES"}
            data = packed([_read(image) for image in images])
        head = json.dumps(
            {
                "inputs": [about | {"parameters": {"binary_data_size": len(data)}}],
                "outputs": [{"name": name} for name in outputs],
                "parameters": {"binary_data_output": True} | ({} if mode is None else {"mode": mode}),
            }
        ).encode()
        path = f"/v2/models/{quote(bundle, '')}" + (f"/versions/{quote(version, '')}" if version else "") + "/infer"
        answer = self._ask("POST", path, content=head + data, headers={LENGTH_HEADER: str(len(head))})
        if not _good(answer):
            raise ClientError(f"the request was refused, status {answer.status_code}: {_error(answer).message}")
        return _understood(answer, lambda: _columns(answer))

    def models(self) -> dict[str, list[str]]:
        """List the versions of each bundle (ASGI front end only). Raises ClientError."""
        answer = self._ask("GET", "/v2/models")
        if not _good(answer):
            raise ClientError(f"no list of bundles, status {answer.status_code}: {_error(answer).message}")
        return _understood(answer, lambda: {model["name"]: model["versions"] for model in answer.json()["models"]})

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        end = time.monotonic() + self.patience
        pause = 0.1
        while True:
            try:
                answer = self._http.request(method, path, **request)
                if answer.status_code not in (429, 503) or time.monotonic() + pause > end:
                    return answer
                wait = answer.headers.get("retry-after", "")
                pause = max(pause, float(wait) if wait.isdigit() else 0)
            except httpx.TransportError as e:
                if time.monotonic() + pause > end:
                    raise ClientError(f"{self._http.base_url} does not answer ({e!r}): is the server running?") from e
            time.sleep(min(pause, LONGEST_PAUSE, max(0.0, end - time.monotonic())))
            pause = min(2 * pause, LONGEST_PAUSE)


def _trusted(ca: str | Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as e:  # that of OpenSSL is one, too
        why = e.strerror or e
        raise ClientError(f"{ca} is no file of certificates ({why}): pass the authority's certificate, as PEM") from e


def _read(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as e:
        raise ClientError(f"{image} cannot be read ({e.strerror}): check the path") from e


def _good(answer: httpx.Response) -> bool:
    return answer.status_code == 200


def _understood(answer: httpx.Response, make: Callable[[], T]) -> T:
    try:
        return make()
    except (ValueError, TypeError, KeyError) as e:
        raise ClientError(f"{answer.url} gives another answer ({e!r}): is this a Cascade server?") from e


def _error(answer: httpx.Response) -> ItemError:
    """The error in an answer; TorchServe itself and proxies send other bodies, or none."""
    try:
        error = answer.json()["error"]
        return (
            ItemError(error["kind"], error["message"]) if isinstance(error, dict) else ItemError(*error.split(": ", 1))
        )
    except (ValueError, TypeError, KeyError):
        text = " ".join(answer.text.split())[:200]
        return ItemError("http", f"status {answer.status_code}: {text or answer.reason_phrase}")


def _columns(answer: httpx.Response) -> dict[str, Any]:
    offset = int(answer.headers.get(LENGTH_HEADER, len(answer.content)))
    head = json.loads(answer.content[:offset])
    columns: dict[str, Any] = {"version": head["model_version"]}
    for output in head["outputs"]:
        data = answer.content[offset : offset + output["parameters"]["binary_data_size"]]
        offset += len(data)
        if output["datatype"] == "BYTES":
            columns[output["name"]] = [text.decode() for text in unpacked(data)]
        else:
            columns[output["name"]] = np.frombuffer(data, NUMPY[output["datatype"]]).reshape(output["shape"])
    return columns
