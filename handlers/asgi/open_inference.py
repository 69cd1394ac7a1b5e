"""The Open Inference Protocol, version 2, with the binary-data extension: bytes to images, and answers to bytes.

docs/http.md lists the tensors. The protocol defines the names and the order of the fields; optional ones may be null.
"""

import asyncio
import base64
import binascii
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from cascade.bundle.format import Bundle
from cascade.engine.results import DISPATCH_MODES, INPUT_MODES, DispatchMode, ItemError, Options, Prediction, Unknown
from cascade.engine.tenants import Priority
from cascade.model.fusion import MODES
from cascade.open_inference import ALL_OUTPUTS, DEFERRAL_OUTPUTS, LENGTH_HEADER, NUMPY, OUTPUTS, packed, unpacked
from handlers.asgi.middleware import Refusal
from handlers.requests import NOT_FINITE
from handlers.statuses import status_of

NUMBERED: dict[int, Priority] = {1: "interactive", 2: "batch"}
"""Priorities of Triton's clients; 0 is the default."""
MAX_VALUES = 2**20
"""Commas and brackets in a request's JSON: six images of 224 px as numbers. A parsed value takes up to 60 bytes."""

JSON_OR_BYTES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer.", "content": {"application/json": {}, "application/octet-stream": {}}}
}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
"""Description of a request to .../infer, which FastAPI does not parse itself."""


class TensorParameters(BaseModel):
    """Parameters of an input: where its data is."""

    binary_data_size: int | None = Field(default=None, ge=0, strict=True, description="Bytes behind the JSON part.")


class Input(BaseModel):
    """`image` (encoded files) or `pixels` (preprocessed)."""

    name: Literal["image", "pixels"]
    shape: list[Annotated[int, Field(ge=0, le=2**31)]] = Field(max_length=8)
    datatype: str
    parameters: TensorParameters | None = None
    data: list[Any] | None = Field(default=None, description="Files in base64 for `image`, numbers for `pixels`.")


class OutputParameters(BaseModel):
    """How an output is sent."""

    binary_data: bool | None = None


class Output(BaseModel):
    """A requested output."""

    name: Literal[
        "cluster",
        "confidence",
        "ood",
        "embedding",
        "label",
        "error",
        "bundle",
        "bundle_confidence",
        "input_size",
        "deferred",
    ]
    parameters: OutputParameters | None = None


class RequestParameters(BaseModel):
    """Options of the whole request."""

    mode: str | None = Field(default=None, description=f"One of {', '.join((*MODES, *INPUT_MODES))}.")
    priority: Literal["interactive", "batch", 0, 1, 2] | None = Field(
        default=None, description="interactive or batch; Triton's clients send 1 or 2."
    )
    dispatch: DispatchMode | None = Field(
        default=None, description=f"Of the model auto: one of {', '.join(DISPATCH_MODES)}."
    )
    unknown: Unknown | None = Field(
        default=None, description="Of the model auto, for images that fit no bundle: error, or embedding."
    )
    binary_data_output: bool | None = None


class InferRequest(BaseModel):
    """The JSON part of a request to .../infer."""

    model_config = ConfigDict(title="InferRequest")
    id: str | None = Field(default=None, max_length=256)
    parameters: RequestParameters | None = None
    inputs: list[Input] = Field(min_length=1, max_length=1)
    outputs: list[Output] | None = Field(default=None, max_length=16)


@dataclass(frozen=True)
class Inference:
    """A parsed request.

    Attributes:
        images: encoded files, or tensors float32 [3, H, W].
        outputs: name, and whether it is sent as binary data.
    """

    id: str | None
    mode: str | None
    priority: Priority | None
    images: list[bytes | Tensor]
    outputs: dict[str, bool]
    dispatch: DispatchMode
    unknown: Unknown

    @property
    def labels(self) -> int:
        """Number of labels that its answers need."""
        return int(not self.outputs.keys().isdisjoint({"label", *DEFERRAL_OUTPUTS}))


def parse(body: bytes, json_length: str | None, most: int, default: Iterable[str] = OUTPUTS) -> Inference:
    """Parse a request of at most ``most`` images; ``json_length`` is the value of LENGTH_HEADER.

    Args:
        default: outputs of a request that names none.

    Raises:
        Refusal: with 400, or 413 for too many images.
    """
    length = len(body) if json_length is None else _length(json_length, len(body))
    values = sum(body.count(mark, 0, length) for mark in (b",", b"[", b"{"))
    if values > MAX_VALUES:
        raise Refusal(ItemError("json_too_large", f"JSON of over {MAX_VALUES} values: send tensors as binary data"))
    try:
        asked = InferRequest.model_validate_json(body[:length])
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the JSON part"
        raise _bad(f"{where}: {first['msg']}"[:300].replace("\n", " ")) from None
    (tensor,) = asked.inputs
    rest = memoryview(body)[length:]
    size = tensor.parameters and tensor.parameters.binary_data_size
    if len(rest) != (size or 0):
        raise _bad(f"{len(rest)} bytes follow the JSON part where binary_data_size says {size or 0}")
    if (size is None) == (tensor.data is None):
        raise _bad(f"input {tensor.name} needs data, or binary_data_size and the bytes behind the JSON part; not both")
    images = (_files if tensor.name == "image" else _pixels)(tensor, rest, most)
    options = asked.parameters or RequestParameters()
    binary = bool(options.binary_data_output)
    outputs: dict[str, bool] = dict.fromkeys(default, binary)
    if asked.outputs is not None:
        choices = {o.name: o.parameters.binary_data if o.parameters else None for o in asked.outputs}
        outputs = {name: binary if choice is None else choice for name, choice in choices.items()}
    priority = NUMBERED.get(options.priority) if isinstance(options.priority, int) else options.priority
    dispatch, unknown = options.dispatch or Options.dispatch, options.unknown or Options.unknown
    return Inference(asked.id, options.mode, priority, images, outputs, dispatch, unknown)


def _length(text: str, most: int) -> int:
    """Parse the length of the JSON part; the header may have any number of digits."""
    digits = text.lstrip("0") or text[:1]
    if not (digits.isascii() and digits.isdigit() and len(digits) <= len(str(most)) and int(digits) <= most):
        raise _bad(f"{LENGTH_HEADER} must be the length of the JSON part, {most} at most")
    return int(digits)


def response(
    asked: Inference, model: tuple[str, str], answers: Sequence[Prediction | ItemError], width: int
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON part if binary data follows.

    Args:
        model: name and version. width: of the embeddings.
    """
    described, blobs = [], []
    for name, binary in asked.outputs.items():
        values = _column(name, width, answers)
        tensor: dict[str, Any] = {"name": name, "datatype": ALL_OUTPUTS[name], "shape": list(np.shape(values))}
        if binary:
            texts = isinstance(values, list)
            blobs.append(packed([text.encode() for text in values]) if texts else values.tobytes())
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            tensor["data"] = values if isinstance(values, list) else values.ravel().tolist()
        described.append(tensor)
    head: dict[str, Any] = {"model_name": model[0], "model_version": model[1]}
    head |= ({} if asked.id is None else {"id": asked.id}) | {"outputs": described}
    try:
        text = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        raise Refusal(NOT_FINITE) from None
    return b"".join([text, *blobs]), len(text) if blobs else None


async def reply(
    asked: Inference, model: tuple[str, str], answers: Sequence[Prediction | ItemError], width: int
) -> Response:
    """Make the HTTP response; arguments as in ``response``.

    Raises:
        Refusal: no image has an answer, because of the server or a limit of the caller.
    """
    errors = [answer for answer in answers if isinstance(answer, ItemError)]
    if len(errors) == len(answers) and status_of(errors[0]) in (429, *range(500, 600)):
        raise Refusal(errors[0])
    content, length = await asyncio.to_thread(response, asked, model, answers, width)
    if length is None:
        return Response(content, media_type="application/json")
    return Response(content, headers={LENGTH_HEADER: str(length)}, media_type="application/octet-stream")


def metadata(bundle: Bundle) -> dict[str, Any]:
    """A bundle's metadata for clients: its inputs and outputs."""
    side = bundle.preprocessing.size
    shapes = {"embedding": [-1, bundle.card.dim]}
    return {
        "name": bundle.name,
        "platform": "cascade",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, side, side]},
        ],
        "outputs": [{"name": n, "datatype": t, "shape": shapes.get(n, [-1])} for n, t in outputs_of(bundle).items()],
    }


def outputs_of(bundle: Bundle) -> dict[str, str]:
    """The outputs of one bundle, and their datatypes."""
    return OUTPUTS if bundle.larger is None else OUTPUTS | DEFERRAL_OUTPUTS


def _files(tensor: Input, rest: memoryview, most: int) -> list[bytes | Tensor]:
    if tensor.datatype != "BYTES" or len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ([], [1]):
        raise _bad("input image is BYTES [N]")
    count = _count(tensor, most)
    if tensor.data is None:
        try:
            files = [*unpacked(rest)]
        except ValueError as e:
            raise _bad(str(e)) from None
    else:
        texts = [text for row in tensor.data for text in (row if isinstance(row, list) else [row])]
        try:
            files = [base64.b64decode(text, validate=True) for text in texts]
        except (ValueError, TypeError, binascii.Error):
            raise _bad("data of input image is files in base64; send others as binary data") from None
    if len(files) != count:
        raise _bad(f"input image holds {len(files)} files where its shape says {count}")
    return [*files]


def _pixels(tensor: Input, rest: memoryview, most: int) -> list[bytes | Tensor]:
    if tensor.datatype != "FP32" or len(tensor.shape) != 4 or tensor.shape[1] != 3 or min(tensor.shape[2:]) < 1:
        raise _bad("input pixels is FP32 [N, 3, H, W]")
    _count(tensor, most)
    if tensor.data is None:
        if len(rest) % 4:
            raise _bad("binary data of FP32 has a multiple of 4 bytes")
        values = np.frombuffer(rest, NUMPY["FP32"])
    else:
        try:
            numbers = np.asarray(tensor.data)
        except ValueError:  # nested lists of unequal lengths
            numbers = np.asarray("")
        if numbers.dtype.kind not in "iuf":
            raise _bad("data of input pixels is numbers, flat or nested as its shape says")
        values = numbers.astype(np.float32).ravel()
    if values.size != math.prod(tensor.shape):
        raise _bad(f"input pixels holds {values.size} numbers where its shape says {math.prod(tensor.shape)}")
    return [*torch.from_numpy(values.astype(np.float32).reshape(tensor.shape))]


def _count(tensor: Input, most: int) -> int:
    count = tensor.shape[0]
    if count < 1:
        raise _bad("send at least one image")
    if count > most:
        raise Refusal(ItemError("too_many_images", f"{count} images in one request: send at most {most}"))
    return count


def _column(name: str, width: int, answers: Sequence[Prediction | ItemError]) -> Any:
    """One output: an array or a list of strings. Images without an answer get -1 for the cluster, else 0 or empty."""
    good = [None if isinstance(answer, ItemError) else answer for answer in answers]
    match name:
        case "cluster":
            return np.array([-1 if a is None else a.cluster for a in good], NUMPY["INT64"])
        case "embedding":
            blank = np.zeros(width, np.float32)
            return np.stack([blank if a is None or a.embedding is None else a.embedding for a in good]).astype(
                NUMPY["FP32"]
            )
        case "label":
            return [a.labels[0].name if a and a.labels else "" for a in good]
        case "bundle":
            return [a.bundle if a else "" for a in good]
        case "bundle_confidence":
            sure = [0 if a is None else 1 if a.dispatch is None else a.dispatch.confidence for a in good]
            return np.array(sure, NUMPY["FP32"])
        case "input_size":
            return np.array([a.deferral.input_size if a and a.deferral else 0 for a in good], NUMPY["INT64"])
        case "deferred":
            return np.array([bool(a and a.deferral and a.deferral.deferred) for a in good], NUMPY["BOOL"])
        case "error":
            return [f"{status_of(a)} {a.kind}: {a.message}" if isinstance(a, ItemError) else "" for a in answers]
        case _:
            return np.array([0 if a is None else getattr(a, name) for a in good], NUMPY["FP32"])


def _bad(message: str) -> Refusal:
    return Refusal(ItemError("bad_request", message))
