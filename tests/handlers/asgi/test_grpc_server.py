"""gRPC by unmodified clients: Triton's, and a health probe; the same answers, keys and limits as over HTTP."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from cascade import Engine, ItemError, Options
from cascade.bundle.format import write
from cascade.engine.batcher import Batcher
from cascade.engine.registry import Registry
from cascade.engine.stores import load_store
from cascade.errors import CascadeError
from handlers.asgi import grpc_server
from handlers.asgi.app import create_app
from handlers.asgi.keys import Keys
from handlers.asgi.middleware import Guard
from handlers.asgi.service import Service
from tests.helpers.answers import embeddings
from tests.helpers.asgi_app import LIMITS, expected
from tests.helpers.bundles import handmade, named
from tests.helpers.grpc_app import serving
from tests.helpers.keys import digest

ADMIN, CUSTOMER = ({"authorization": f"Bearer {key}"} for key in ("admin", "customer"))


@pytest.fixture(scope="module")
def service(cifar: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store = tmp_path_factory.mktemp("grpc") / "store"
    bundle = handmade(cifar[:20], mask_from=3, size=32)
    for name, version in (("birds", "1"), ("birds", "2"), ("ships", "1")):
        write(named(bundle, name, version), store / name / version)
    registry = load_store(Engine(), store)
    with Batcher(registry.engine, queue=16, max_batch=8) as batcher:
        yield Service(batcher, limits=LIMITS, registry=registry)


def application(service: Service) -> Guard:
    return create_app(service, registry=cast(Registry, service.registry))


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with serving(application(service)) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as client:
        yield client


def image_input(files: list[bytes]) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, object))
    return tensor


def refused(call: Callable[[], Any]) -> tuple[str, str]:
    """Status and kind of the error."""
    with pytest.raises(InferenceServerException) as raised:
        call()
    return raised.value.status(), raised.value.message().partition(":")[0]


def test_health_and_metadata(client: triton.InferenceServerClient, address: str) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("birds") and client.is_model_ready("birds", "1")
    assert not client.is_model_ready("cats") and not client.is_model_ready("birds", "9")
    assert client.get_server_metadata().name == "cascade"
    metadata = client.get_model_metadata("birds", "1")
    assert (metadata.name, list(metadata.versions)) == ("birds", ["1", "2"])
    assert {tensor.name: list(tensor.shape) for tensor in metadata.inputs} == {"image": [-1], "pixels": [-1, 3, 32, 32]}
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        serving_status = health_pb2.HealthCheckResponse.SERVING
        assert stub.Check(health_pb2.HealthCheckRequest()).status == serving_status
        watched = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(watched).status == serving_status
        watched.cancel()


def test_answers_are_the_engines(client: triton.InferenceServerClient, service: Service, files: list[bytes]) -> None:
    want = expected(service.engine, files, bundle="birds", version="1")
    answer = client.infer("birds", [image_input(files)], "1", request_id="seven")
    assert (answer.get_response().model_version, answer.get_response().id) == ("1", "seven")
    assert answer.as_numpy("cluster").tolist() == [each.cluster for each in want]
    np.testing.assert_allclose(answer.as_numpy("embedding"), embeddings(want), atol=1e-3)
    assert [label.decode() for label in answer.as_numpy("label")] == [each.labels[0].name for each in want]
    assert list(answer.as_numpy("error")) == [b""] * len(files)
    only = client.infer("birds", [image_input(files[:1])], outputs=[triton.InferRequestedOutput("label")])
    assert [output.name for output in only.get_response().outputs] == ["label"]
    plain = client.infer("birds", [image_input(files[:1])], parameters={"mode": "dispatcher"})
    (mode,) = expected(service.engine, files[:1], bundle="birds", mode="dispatcher")
    np.testing.assert_allclose(plain.as_numpy("embedding"), embeddings([mode]), atol=1e-3)


def test_pixels_and_typed_fields(
    client: triton.InferenceServerClient, service: Service, cifar: list[Image.Image], address: str
) -> None:
    bundle = service.engine.find("birds", "1")
    transform = bundle.preprocessing.transform()  # type: ignore[union-attr]
    pixels = np.stack([transform(image).numpy() for image in cifar[:2]])
    tensor = triton.InferInput("pixels", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels)
    clusters = client.infer("birds", [tensor], "1").as_numpy("cluster").tolist()
    answers = service.engine.predict(cifar[:2], Options("birds", "1"))
    assert clusters == [answer.cluster for answer in answers]  # type: ignore[union-attr]
    request = grpc_server.pb.ModelInferRequest(model_name="birds", model_version="1")
    request.inputs.add(name="pixels", datatype="FP32", shape=pixels.shape).contents.fp32_contents.extend(pixels.ravel())
    with grpc.insecure_channel(address) as channel:
        stub = grpc_server.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        outputs = stub.ModelInfer(request)
        names = [output.name for output in outputs.outputs]
        raw = outputs.raw_output_contents[names.index("cluster")]
        assert np.frombuffer(raw, "<i8").tolist() == clusters
        request.inputs[0].datatype = "FP16"
        with pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(request)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_errors_have_codes_and_say_what_to_do(client: triton.InferenceServerClient, files: list[bytes]) -> None:
    good = image_input(files[:1])
    assert refused(lambda: client.infer("cats", [good])) == ("StatusCode.NOT_FOUND", "unknown_bundle")
    assert refused(lambda: client.infer("birds", [good], "9")) == ("StatusCode.NOT_FOUND", "unknown_version")
    assert refused(lambda: client.infer("birds", [image_input([b"x"] * 9)])) == (
        "StatusCode.RESOURCE_EXHAUSTED",
        "too_many_images",
    )
    bad = client.infer("birds", [image_input([b"hello", files[0]])])
    errors = [error.decode() for error in bad.as_numpy("error")]
    assert errors[0].startswith("400 not_an_image") and errors[1] == ""
    (error,) = client.infer("birds", [good], parameters={"mode": "best"}).as_numpy("error")
    assert error.startswith(b"400 unknown_mode")
    assert refused(lambda: client.get_model_config("birds")) == ("StatusCode.UNIMPLEMENTED", "not_implemented")
    assert refused(lambda: client.get_log_settings())[0] == "StatusCode.UNIMPLEMENTED"
    assert refused(lambda: client.load_model("birds")) == ("StatusCode.NOT_FOUND", "management_off")


def test_a_bundle_that_is_tried_again_is_unavailable(
    client: triton.InferenceServerClient, service: Service, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ItemError("bundle_unavailable", "later", 41.2)
    monkeypatch.setattr(service.engine, "explain", lambda *_: error)
    good = image_input(files[:1])
    assert refused(lambda: client.infer("cats", [good])) == ("StatusCode.UNAVAILABLE", "bundle_unavailable")
    assert not client.is_model_ready("cats")


def test_keys_and_management(service: Service, files: list[bytes]) -> None:
    admin, customer = (bytes.fromhex(digest(key)) for key in ("admin", "customer"))
    keys = Keys((("*", admin), ("birds", customer)), admins=frozenset([admin]))
    guard = application(Service(service.batcher, keys, LIMITS, service.registry))
    with serving(guard) as address, triton.InferenceServerClient(address) as client:
        good = image_input(files[:1])
        assert refused(lambda: client.infer("birds", [good])) == ("StatusCode.UNAUTHENTICATED", "key_missing")
        assert refused(lambda: client.infer("ships", [good], headers=CUSTOMER))[0] == "StatusCode.PERMISSION_DENIED"
        assert client.infer("birds", [good], headers=CUSTOMER).get_response().model_name == "birds"
        assert refused(lambda: client.unload_model("birds", headers=CUSTOMER))[1] == "key_not_admin"
        client.unload_model("ships", headers=ADMIN)
        states = {m.name: m.state for m in client.get_model_repository_index(headers=ADMIN).models}
        assert states == {"birds": "READY", "ships": "UNAVAILABLE"}
        client.load_model("ships", headers=ADMIN)
        assert client.is_model_ready("ships", headers=ADMIN)
        statistics = client.get_inference_statistics("birds", headers=ADMIN)
        assert [stats.name for stats in statistics.model_stats] == ["birds", "birds"]


def test_a_taken_port_is_named(service: Service, address: str) -> None:
    async def twice() -> None:
        port = int(address.rpartition(":")[2])
        async with grpc_server.serving(create_app(service), "127.0.0.1", port, LIMITS, 1):
            pass

    with pytest.raises(CascadeError, match="choose another --grpc-port"):
        asyncio.run(twice())


def test_a_server_that_stops_is_unavailable(
    service: Service, client: triton.InferenceServerClient, files: list[bytes]
) -> None:
    service.stopping = True
    try:
        assert not client.is_server_ready()
        assert refused(lambda: client.infer("birds", [image_input(files[:1])])) == (
            "StatusCode.UNAVAILABLE",
            "stopping",
        )
    finally:
        service.stopping = False


def test_a_module_that_is_missing_names_its_extra(tmp_path: Path) -> None:
    from cascade.extras import missing

    assert "cascade-vision[grpc]" in str(missing(ModuleNotFoundError(name="grpc_health.v1")))
