"""gRPC for the Open Inference Protocol, next to HTTP: ``cascade serve --grpc-port 8001``.

Each call becomes the equivalent HTTP request to the same application, in memory. So keys, limits, tenants, batching,
logs and draining are the same for both. Messages and stubs come from ``tritonclient``.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from cascade.errors import CascadeError
from cascade.open_inference import LENGTH_HEADER, packed
from handlers.asgi.in_memory import Answer, ask
from handlers.asgi.middleware import App, Limits
from handlers.asgi.tls import Certificate
from handlers.asgi.watched import Watched

log = logging.getLogger("cascade.grpc")
AROUND = 2**20  # bytes of a message around its tensors
FRAME = 2**20  # bytes of an HTTP/2 frame at most; the default of 16 KiB makes many of an image
LENGTH = LENGTH_HEADER.lower()
WATCH_SECONDS = 1.0  # between two health checks for a client that watches
STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""gRPC's code for an HTTP status; INTERNAL for all others."""
CONTENTS = {"FP32": ("fp32_contents", "<f4"), "INT64": ("int64_contents", "<i8")}


class Inference(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The calls that have an HTTP route; all others are UNIMPLEMENTED."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def ServerLive(self, request: Message, context: grpc.aio.ServicerContext) -> Message:
        live = (await ask(self.app, "GET", "/v2/health/live")).status == 200
        return pb.ServerLiveResponse(live=live)

    async def ServerReady(self, request: Message, context: grpc.aio.ServicerContext) -> Message:
        ready = (await ask(self.app, "GET", "/v2/health/ready")).status == 200
        return pb.ServerReadyResponse(ready=ready)

    async def ModelReady(self, request: Any, context: grpc.aio.ServicerContext) -> Message:
        answer = await ask(self.app, "GET", f"{_path(request)}/ready", _headers(context))
        if answer.status not in (200, 404, 503):
            await _check(answer, context)
        return pb.ModelReadyResponse(ready=answer.status == 200)

    async def ServerMetadata(self, request: Message, context: grpc.aio.ServicerContext) -> Message:
        return await self._ask("GET", "/v2", context, pb.ServerMetadataResponse())

    async def ModelMetadata(self, request: Any, context: grpc.aio.ServicerContext) -> Message:
        return await self._ask("GET", _path(request), context, pb.ModelMetadataResponse())

    async def ModelStatistics(self, request: Any, context: grpc.aio.ServicerContext) -> Message:
        return await self._ask("GET", f"{_path(request)}/stats", context, pb.ModelStatisticsResponse())

    async def RepositoryIndex(self, request: Any, context: grpc.aio.ServicerContext) -> Message:
        body = json.dumps({"ready": request.ready}).encode()
        return await self._ask("POST", "/v2/repository/index", context, pb.RepositoryIndexResponse(), body, "models")

    async def RepositoryModelLoad(self, request: Any, context: grpc.aio.ServicerContext) -> Message:
        path = f"/v2/repository/models/{request.model_name}/load"
        body = json.dumps({"parameters": dict.fromkeys(request.parameters, "")}).encode()
        return await self._ask("POST", path, context, pb.RepositoryModelLoadResponse(), body)

    async def RepositoryModelUnload(self, request: Any, context: grpc.aio.ServicerContext) -> Message:
        path = f"/v2/repository/models/{request.model_name}/unload"
        return await self._ask("POST", path, context, pb.RepositoryModelUnloadResponse(), b"{}")

    async def ModelInfer(self, request: Any, context: grpc.aio.ServicerContext) -> Message:
        try:
            head, tensors = _http_request(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"bad_request: {error}")
        headers = _headers(context) | {LENGTH: str(len(head))}
        path = f"{_path(request, request.model_name, request.model_version)}/infer"
        answer = await ask(self.app, "POST", path, headers, head, *tensors)
        await _check(answer, context)
        return _infer_response(answer)

    async def _ask(
        self, method: str, path: str, context: grpc.aio.ServicerContext, into: Message, body: bytes = b"", key: str = ""
    ) -> Message:
        """Call a route and convert its answer to a message. ``key``: the message's field for a list."""
        answer = await ask(self.app, method, path, _headers(context), body)
        await _check(answer, context)
        found = json.loads(answer.body)
        ParseDict({key: found} if key else found, into, ignore_unknown_fields=True)
        return into


async def _unimplemented(self: Inference, request: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not_implemented: this server has no such call")


for _name in vars(service_pb2_grpc.GRPCInferenceServiceServicer).keys() - vars(Inference).keys():
    if _name[0].isupper():  # those of the generated base class log an error each time
        setattr(Inference, _name, _unimplemented)


class Health(health_pb2_grpc.HealthServicer):
    """The health service that Kubernetes and load balancers poll."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def Check(self, request: Message, context: grpc.aio.ServicerContext) -> Message:
        ready = (await ask(self.app, "GET", "/v2/health/ready")).status == 200
        serving = health_pb2.HealthCheckResponse.ServingStatus
        return health_pb2.HealthCheckResponse(status=serving.SERVING if ready else serving.NOT_SERVING)

    async def Watch(self, request: Message, context: grpc.aio.ServicerContext) -> AsyncIterator[Message]:
        last = None
        while True:
            status = await self.Check(request, context)
            if status != last:
                yield status
                last = status
            await asyncio.sleep(WATCH_SECONDS)


@asynccontextmanager
async def serving(
    app: App, host: str, port: int, limits: Limits, grace: float, certificate: Watched[Certificate] | None = None
) -> AsyncIterator[int]:
    """Serve the application by gRPC until the block ends; yields the port.

    Args:
        host: an address. port: 0 for any free one.
        grace: seconds for calls in progress at the end.
        certificate: for TLS.

    Raises:
        CascadeError: the address is taken.
    """
    options = [("grpc.max_receive_message_length", limits.body + AROUND), ("grpc.http2.max_frame_size", FRAME)]
    server = grpc.aio.server(options=[*options, ("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Inference(app), server)
    health_pb2_grpc.add_HealthServicer_to_server(Health(app), server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if certificate is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, _credentials(certificate))
    except RuntimeError:
        raise CascadeError(f"cannot listen on {address} for gRPC: choose another --grpc-port") from None
    await server.start()
    log.info("gRPC on %s", address if port else f"{host}:{bound}")
    try:
        yield bound
    finally:
        await server.stop(grace)


def _credentials(certificate: Watched[Certificate]) -> grpc.ServerCredentials:
    """For TLS; each new connection gets the current certificate."""

    def current() -> grpc.ServerCertificateConfiguration:
        value = certificate.value
        return grpc.ssl_server_certificate_configuration([(value.key, value.chain)])

    return grpc.dynamic_ssl_server_credentials(current(), current)


def _headers(context: grpc.aio.ServicerContext) -> dict[str, str]:
    """The metadata of a call as headers, without those that gRPC itself sends."""
    pairs = context.invocation_metadata() or ()
    wanted = ("authorization", "x-request-id", "traceparent", "tracestate")
    return {key: value for key, value in pairs if isinstance(value, str) and key in wanted}


def _path(request: Any, name: str | None = None, version: str | None = None) -> str:
    name, version = request.name if name is None else name, request.version if version is None else version
    return f"/v2/models/{name}" + (f"/versions/{version}" if version else "")


async def _check(answer: Answer, context: grpc.aio.ServicerContext) -> None:
    """Abort the call if the answer is an error; ``retry-after`` goes into the trailing metadata."""
    if answer.status == 200:
        return
    if (seconds := answer.headers.get("retry-after")) is not None:
        context.set_trailing_metadata((("retry-after", seconds),))
    json_body = answer.headers.get("content-type") == "application/json"
    body = json.loads(answer.body).get("error", "") if json_body else answer.body.decode()
    text = body if isinstance(body, str) else f"{body.get('kind')}: {body.get('message')}"
    await context.abort(STATUSES.get(answer.status, grpc.StatusCode.INTERNAL), text)


def _http_request(request: Any) -> tuple[bytes, list[bytes]]:
    """The JSON part and the binary tensors of a ModelInferRequest. Raises ValueError."""
    raw = list(request.raw_input_contents) or [_raw(tensor) for tensor in request.inputs]
    if len(raw) != len(request.inputs):
        raise ValueError(f"{len(raw)} raw tensors for {len(request.inputs)} inputs")
    inputs = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "datatype": tensor.datatype,
            "parameters": {"binary_data_size": len(data)},
        }
        for tensor, data in zip(request.inputs, raw, strict=True)
    ]
    document: dict[str, Any] = {"inputs": inputs}
    document["parameters"] = _parameters(request.parameters) | {"binary_data_output": True}
    if request.id:
        document["id"] = request.id
    if request.outputs:
        document["outputs"] = [{"name": output.name} for output in request.outputs]
    return json.dumps(document).encode(), raw


def _raw(tensor: Any) -> bytes:
    """Convert a tensor in typed fields to the bytes that ``raw_input_contents`` would contain."""
    if tensor.datatype == "BYTES":
        return packed(list(tensor.contents.bytes_contents))
    field, dtype = CONTENTS.get(tensor.datatype, ("", ""))
    if not field:
        raise ValueError(f"input {tensor.name} has datatype {tensor.datatype}: send BYTES or FP32")
    return np.asarray(getattr(tensor.contents, field), dtype).tobytes()


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    return {name: getattr(parameters[name], choice) for name, choice in chosen.items() if choice is not None}


def _infer_response(answer: Answer) -> Message:
    """The message for an answer whose outputs are binary data."""
    length = int(answer.headers.get(LENGTH, len(answer.body)))  # the whole body if no output is requested
    document = json.loads(answer.body[:length])
    message = pb.ModelInferResponse(
        model_name=document["model_name"], model_version=document["model_version"], id=document.get("id", "")
    )
    begin = length
    for output in document["outputs"]:
        end = begin + output["parameters"]["binary_data_size"]
        message.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        message.raw_output_contents.append(answer.body[begin:end])
        begin = end
    return message
