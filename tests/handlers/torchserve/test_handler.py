"""The handler over TorchServe's own Context, with a stand-in for the engine (tests/e2e has the real one)."""

import base64
import inspect
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ts.context import Context, RequestProcessor
from ts.utils.util import list_classes_from_module

from cascade import tracing
from cascade.bundle.format import write
from cascade.engine.decoders import Decoders
from cascade.engine.results import ItemError, Options, Prediction
from cascade.engine.unknown import NAME
from cascade.logs import JsonLines
from cascade.malloc_trim import Heap
from handlers.statuses import status_of
from handlers.torchserve import handler
from handlers.torchserve.handler import CascadeHandler
from handlers.torchserve.handler import _parse as parse
from tests.conftest import sheet
from tests.helpers.bundles import handmade, named
from tests.helpers.domains import with_domain
from tests.helpers.paths import DATA

PHOTO = (DATA / "photos" / "cat-0000.png").read_bytes()


class Engine:
    """Answers with the number of images in the batch as the cluster; the image b"bad" is an error."""

    def __init__(self) -> None:
        self.calls: list[list[Options]] = []
        self.threads: set[str] = set()

    def predict(self, images: list[bytes], options: list[Options], decode: Any) -> list[Prediction | ItemError]:
        self.calls.append(options)
        self.threads |= {*decode(lambda image, wish: threading.current_thread().name, images, options)}
        bad = ItemError("not_an_image", "this is not an image")
        good = Prediction("demo", "1", "conditional", len(images), 0.5, 0.5, ("dispatcher", "expert-1"))
        return [bad if image == b"bad" else good for image in images]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[CascadeHandler]:
    served = CascadeHandler()
    served.engine = Engine()  # type: ignore[assignment]
    served.gate = tmp_path / "gate"
    served.gate.touch()
    served.memory = Heap()
    served.decoders = Decoders(2, cpu_seconds=60)
    yield served
    served.decoders.close()


def batch(*requests: tuple[bytes, dict[str, Any]]) -> tuple[list[dict[str, Any]], Context]:
    """What TorchServe 0.12 hands to a handler for raw bodies."""
    context = Context("cascade", None, None, 8, None, "0.12.0")
    context.request_processor = [
        RequestProcessor({"body": {"content-type": headers.get("Content-Type", "image/png")}} | headers)
        for _, headers in requests
    ]
    return [{"body": bytearray(body)} if body else {} for body, _ in requests], context


def ask(body: bytes, content_type: str = "image/png", **headers: Any) -> tuple[bytes, Options] | ItemError:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return parse({"body": bytearray(body)}, {"body": {"content-type": content_type}} | named)


def error(answer: tuple[bytes, Options] | ItemError) -> tuple[int, str]:
    assert isinstance(answer, ItemError)
    assert "\n" not in answer.message
    return status_of(answer), answer.kind


def test_torchserve_accepts_the_module() -> None:
    assert list_classes_from_module(handler) == [CascadeHandler]
    assert CascadeHandler.__mro__ == (CascadeHandler, object)
    assert list(inspect.signature(CascadeHandler).parameters) == []


def test_raw_body_with_headers_in_any_case() -> None:
    assert ask(PHOTO) == (PHOTO, Options())
    headers = {"X-CASCADE-BUNDLE": "birds", "x_cascade_version": "2", "X_Cascade_Mode": "dispatcher"}
    assert ask(PHOTO, **headers) == (PHOTO, Options("birds", "2", "dispatcher"))


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ("labels", Options(neighbors=0)),
        ("Labels , embedding", None),
        ("labels , embedding,", Options(neighbors=0, embedding=True)),
        ("neighbors,labels,embedding", Options(embedding=True)),
        ("", Options(labels=0, neighbors=0)),
        ("labels,masks", None),
    ],
)
def test_fields(fields: str, options: Options | None) -> None:
    answer = ask(PHOTO, X_Cascade_Fields=fields)
    assert error(answer) == (400, "bad_option") if options is None else answer == (PHOTO, options)


def test_json_body() -> None:
    image = base64.b64encode(PHOTO).decode()
    document = {"image": image, "bundle": "birds", "fields": ["embedding"]}
    body = json.dumps(document).encode()
    wanted = (PHOTO, Options("birds", embedding=True, labels=0, neighbors=0))
    assert ask(body, "application/json") == wanted
    assert ask(body, "application/json; charset=utf-8") == wanted
    assert ask(body, "application/json", X_Cascade_Bundle="ships") == wanted, "the body is the closer word"
    assert ask(body, "application/json", X_Cascade_Mode="dispatcher")[1].mode == "dispatcher"  # type: ignore[index]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b'[["image", "AAAA"]]',
        b'"image"',
        b"null",
        b"{}",
        b'{"image": 7}',
        b'{"image": "***"}',
        b'{"image": "AAA"}',
        b'{"image": "\xc3\xa9"}',
        b"[" * 100_000,
    ],
)
def test_broken_json_body(body: bytes) -> None:
    assert error(ask(body, "application/json")) == (400, "bad_request")


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        ({"color": "red"}, "unknown_option"),
        ({"bundle": 7}, "bad_option"),
        ({"mode": ["dispatcher"]}, "bad_option"),
        ({"fields": {"labels": 1}}, "bad_option"),
        ({"fields": [["labels"]]}, "bad_option"),
        ({"fields": 3}, "bad_option"),
    ],
)
def test_bad_options_in_json(document: dict[str, Any], kind: str) -> None:
    body = json.dumps({"image": "AAAA"} | document).encode()
    assert error(ask(body, "application/json")) == (400, kind)


def test_unknown_header() -> None:
    assert error(ask(PHOTO, X_Cascade_Color="red")) == (400, "unknown_option")


def test_forms() -> None:
    part = {"photo": {"content-type": "image/png"}}
    assert parse({"photo": bytearray(PHOTO)}, part) == (PHOTO, Options())
    assert error(parse({"a": bytearray(PHOTO), "b": bytearray(PHOTO)}, part)) == (400, "bad_request")


def test_form_part_named_like_a_header() -> None:
    assert parse({"Host": bytearray(PHOTO)}, {"Host": "127.0.0.1"}) == (PHOTO, Options())
    named = {"X-Cascade-Mode": {"content-type": "image/png"}}
    assert error(parse({"X-Cascade-Mode": bytearray(PHOTO)}, named)) == (400, "bad_option")


def test_errors_never_grow_with_what_was_sent() -> None:
    """An answer over TorchServe's max_response_size would cost the worker its life."""
    for document in ({"image": "AAAA", "x" * 10**6: 1}, {"image": "AAAA", "fields": ["x" * 10**6]}):
        answer = ask(json.dumps(document).encode(), "application/json")
        assert isinstance(answer, ItemError) and len(answer.message) < 200


def test_answer_that_is_no_number_costs_only_itself(served: CascadeHandler) -> None:
    good = Prediction("demo", "1", "conditional", 0, 0.5, 0.5, ("dispatcher",))
    answers = [good, replace(good, confidence=float("nan")), good]
    served.engine = SimpleNamespace(predict=lambda images, options, decode: answers)  # type: ignore[assignment]
    data, context = batch(*[(PHOTO, {})] * 3)
    texts = served.handle(data, context)
    assert [context.get_response_status(i)[0] for i in range(3)] == [200, 500, 200]
    assert json.loads(texts[1])["error"]["kind"] == "not_finite"


def test_a_bundle_that_is_tried_again_says_when(served: CascadeHandler) -> None:
    answers = [ItemError("bundle_unavailable", "later", 41.2), ItemError("unknown_bundle", "never")]
    served.engine = SimpleNamespace(predict=lambda images, options, decode: answers)  # type: ignore[assignment]
    data, context = batch(*[(PHOTO, {})] * 2)
    served.handle(data, context)
    assert [context.get_response_status(i)[0] for i in range(2)] == [503, 404]
    assert [context.get_response_headers(i).get("Retry-After") for i in range(2)] == ["42", None]


@pytest.mark.parametrize(
    ("accept", "binary"),
    [
        ("application/octet-stream", True),
        ("text/html, Application/Octet-Stream;q=0.9", True),
        ("*/*", False),
        ("application/json", False),
        ("", False),
    ],
)
def test_bytes_for_those_who_ask(served: CascadeHandler, accept: str, binary: bool) -> None:
    embedding = np.array([1.5, -2.0, 0.25], np.float32)
    good = Prediction("demo", "1", "conditional", 2, 0.5, 0.25, ("dispatcher", "expert-2"), embedding=embedding)
    seen: list[Options] = []

    def predict(images: list[bytes], options: list[Options], decode: Any) -> list[Prediction | ItemError]:
        seen.extend(options)
        nan = replace(good, embedding=embedding * float("nan"))
        return [good, ItemError("empty", "x"), nan]

    served.engine = SimpleNamespace(predict=predict)  # type: ignore[assignment]
    data, context = batch(*[(PHOTO, {"accept": accept, "X-Cascade-Fields": ""})] * 3)
    bodies = served.handle(data, context)
    assert [o.embedding for o in seen] == [binary] * 3
    kinds = [context.get_response_content_type(i) for i in range(3)]
    assert kinds == ["application/octet-stream" if binary else "application/json", *["application/json"] * 2]
    assert [context.get_response_status(i)[0] for i in range(3)] == [200, 400, 500]
    if binary:
        assert bodies[0] == embedding.tobytes()
        headers = context.get_response_headers(0)
        assert headers["x-cascade-cluster"] == "2" and headers["x-cascade-masks"] == "dispatcher,expert-2"
        assert headers["x-cascade-ood"] == "0.25"


def test_empty_body_is_left_to_the_engine() -> None:
    assert parse({}, {}) == (b"", Options())


def test_one_bad_item_leaves_seven(served: CascadeHandler) -> None:
    requests: list[tuple[bytes, dict[str, Any]]] = [(PHOTO, {})] * 8
    requests[3] = (b"bad", {})
    data, context = batch(*requests)
    answers = [json.loads(text) for text in served.handle(data, context)]
    assert [context.get_response_status(i)[0] for i in range(8)] == [200, 200, 200, 400, 200, 200, 200, 200]
    assert [context.get_response_content_type(i) for i in range(8)] == ["application/json"] * 8
    assert answers[3] == {"error": {"status": 400, "kind": "not_an_image", "message": "this is not an image"}}
    assert all(answer["masks"] == ["dispatcher", "expert-1"] for i, answer in enumerate(answers) if i != 3)
    assert len(served.engine.calls) == 1  # type: ignore[attr-defined]


def test_images_are_decoded_within_a_budget(served: CascadeHandler) -> None:
    """By the threads that have one."""
    served.handle(*batch((PHOTO, {}), (PHOTO, {})))
    assert served.engine.threads == {"cascade-decode"}  # type: ignore[attr-defined]


def test_unreadable_requests_never_reach_the_engine(served: CascadeHandler) -> None:
    data, context = batch((PHOTO, {"X-Cascade-Color": "red"}), (PHOTO, {"x-cascade-bundle": "b"}), (b"", {}))
    answers = [json.loads(text) for text in served.handle(data, context)]
    assert answers[0]["error"]["kind"] == "unknown_option"
    assert context.get_response_status(0) == (400, "Bad Request")
    assert [answer["cluster"] for answer in answers[1:]] == [2, 2]
    assert [o.bundle for o in served.engine.calls[0]] == ["b", None]  # type: ignore[attr-defined]
    data, context = batch((PHOTO, {"X-Cascade-Color": "red"}))
    served.handle(data, context)
    assert len(served.engine.calls) == 1  # type: ignore[attr-defined]


def test_answers_are_compact_json(served: CascadeHandler) -> None:
    (text,) = served.handle(*batch((PHOTO, {})))
    assert text == json.dumps(json.loads(text), separators=(",", ":"))


def test_a_line_for_each_request_and_nothing_of_the_image(
    served: CascadeHandler, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [
        (PHOTO, {"X-Request-Id": "a" * 64, "Authorization": "Bearer s3cret"}),
        (b"bad", {"x-request-id": "a b"}),
    ]
    data, context = batch(*requests)
    context.request_ids = {0: "id-0", 1: "id-1"}
    with caplog.at_level("INFO", "cascade.torchserve"):
        served.handle(data, context)
    first, second = (json.loads(JsonLines().format(record)) for record in caplog.records)
    assert (first["request_id"], first["client_request_id"], first["status"]) == ("id-0", "a" * 64, 200)
    assert (first["bundle"], first["version"], first["cluster"], first["batch"]) == ("demo", "1", 2, 2)
    assert (second["request_id"], second["status"], second["error"]) == ("id-1", 400, "not_an_image")
    assert "client_request_id" not in second
    assert "s3cret" not in caplog.text and len(json.dumps(first)) < 500


def test_no_new_work_once_the_gate_is_gone(served: CascadeHandler) -> None:
    served.gate.unlink()
    data, context = batch((PHOTO, {}), (PHOTO, {}))
    answers = [json.loads(text) for text in served.handle(data, context)]
    assert [answer["error"]["kind"] for answer in answers] == ["stopping"] * 2
    assert context.get_response_status(1) == (503, "Service Unavailable")
    assert not served.engine.calls  # type: ignore[attr-defined]


def test_the_gate_is_locked_while_the_engine_works(served: CascadeHandler) -> None:
    import fcntl

    entered, leave = threading.Event(), threading.Event()

    def predict(images: list[bytes], options: list[Options], decode: Any) -> list[ItemError]:
        entered.set()
        leave.wait(60)
        return [ItemError("empty", "x")]

    served.engine = SimpleNamespace(predict=predict)  # type: ignore[assignment]
    worker = threading.Thread(target=served.handle, args=batch((PHOTO, {})))
    worker.start()
    assert entered.wait(60)
    with served.gate.open() as gate:
        with pytest.raises(BlockingIOError):
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        leave.set()
        worker.join(60)
        fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_each_request_is_in_the_trace_of_its_caller(served: CascadeHandler) -> None:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    callers = [f"{number:032x}" for number in (1, 2, 3)]
    headers = [{"TraceParent": f"00-{caller}-{'1' * 16}-01"} for caller in callers]
    data, context = batch((PHOTO, headers[0]), (b"bad", headers[1]), (PHOTO, headers[2] | {"X-Cascade-Color": "red"}))
    context.request_ids = {i: f"id-{i}" for i in range(3)}
    try:
        served.handle(data, context)
        served.gate.unlink()
        served.handle(*batch((PHOTO, headers[0])))
        assert tracing.begin(cold=False) is None, "all are exported, since the process will be killed"
    finally:
        tracing.use(None)
    spans: dict[str, dict[str, Any]] = {caller: {} for caller in callers}
    for span in exporter.get_finished_spans():
        assert span.context is not None
        spans.get(f"{span.context.trace_id:032x}", {})[span.name] = span
    request = spans[callers[0]]["POST /predictions/cascade"]
    assert request.parent.span_id == int("1" * 16, 16)
    about = {name: request.attributes[f"cascade.{name}"] for name in ("bundle", "version", "request_id")}
    assert about == {"bundle": "demo", "version": "1", "request_id": "id-0"}
    assert request.attributes["http.response.status_code"] == 200
    assert spans[callers[0]].keys() == {"POST /predictions/cascade", "decode", "pass"}
    assert spans[callers[0]]["pass"].attributes["cascade.batch_images"] == 2
    assert spans[callers[1]]["POST /predictions/cascade"].attributes["cascade.error"] == "not_an_image"
    assert spans[callers[2]].keys() == {"POST /predictions/cascade"}, "it never reached the engine"


@pytest.mark.slow
def test_images_that_fit_no_bundle_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = sheet("fashion_mnist")
    bundle = with_domain(handmade(images[:20], name="clothes", experts=0, size=64), images[:200])
    for name in ("clothes", "others"):
        write(named(bundle, name), tmp_path / "store" / name / "1")
    closing: list[Any] = []
    monkeypatch.setattr(handler, "log_to_stderr", lambda level: None)
    monkeypatch.setattr(handler.atexit, "register", closing.append)
    settings: dict[str, Any] = {
        "model_store": str(tmp_path / "store"),
        "budget_bytes": None,
        "memory_bytes": None,
        "pins": {},
        "poll": 0,
        "on_demand": False,
        "keep_unknown": str(tmp_path / "unknown"),
        "keep_images": 2,
        "keep_bytes": 2**20,
        "log_level": "error",
        "device": "cpu",
        "threads": 1,
        "gate": str(tmp_path / "gate"),
        "failures": str(tmp_path / "failures"),
    }
    (tmp_path / "gate").touch()
    served = CascadeHandler()
    served.initialize(SimpleNamespace(model_yaml_config={"cascade": settings}))
    refused = 0
    for photo in sheet("cifar10")[200:210]:
        photo.save(out := BytesIO(), "png")
        (text,) = served.handle(*batch((out.getvalue(), {})))
        refused += "unknown_domain" in str(text)
    closing[0]()
    kept = [path for path in (tmp_path / "unknown").iterdir() if NAME.fullmatch(path.name)]
    assert refused > 2 and len(kept) == 2, "no more than --keep-images"
