"""How a request for one image is read, and how its answer is written."""

import base64
import json

import pytest

from cascade import ItemError, Options
from handlers.requests import header_bytes, header_text, is_compressed, parse

PHOTO = b"\x89PNG"


def packed(**more: object) -> bytes:
    return json.dumps({"image": base64.b64encode(PHOTO).decode()} | more).encode()


def kind(answer: object) -> str:
    assert isinstance(answer, ItemError) and "\n" not in answer.message
    return answer.kind


def test_a_file_with_options_as_headers() -> None:
    headers = {"X-Cascade-Bundle": "demo", "x-cascade-fields": "embedding", "Accept": "*/*"}
    assert parse(PHOTO, "image/png", headers) == (PHOTO, Options("demo", embedding=True, labels=0, neighbors=0))


def test_json_and_its_options_go_before_headers() -> None:
    body = packed(bundle="demo", fields=["labels"])
    assert parse(body, "application/json; charset=utf-8", {"X-Cascade-Bundle": "other"}) == (
        PHOTO,
        Options("demo", neighbors=0),
    )


def test_null_is_like_an_absent_option() -> None:
    assert parse(packed(bundle=None, version=None, mode=None, fields=None), "application/json", {}) == (
        PHOTO,
        Options(),
    )


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"{}", b'{"image": 3}', b'{"image": "*"}', b"9" * 5000])
def test_json_that_is_wrong(body: bytes) -> None:
    assert kind(parse(body, "application/json", {})) == "bad_request"


def test_json_of_many_small_values_is_not_even_parsed() -> None:
    for body in (b"[" * 1000, b'{"image":[' + b"{}," * 1000 + b"0]}", b'{"image":"",' + b"," * 1000 + b"}"):
        answer = parse(body, "application/json", {})
        assert isinstance(answer, ItemError) and answer.kind == "bad_request" and "commas" in answer.message


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "identity, br"])
def test_compressed(coding: str) -> None:
    assert kind(parse(PHOTO, "image/png", {"Content-Encoding": coding})) == "compressed_body"


def test_not_compressed() -> None:
    assert not is_compressed({"Content-Encoding": "identity", "Accept-Encoding": "gzip"})


@pytest.mark.parametrize("name", ["demo", "böse", "日本"])
def test_names_in_headers_are_utf8(name: str) -> None:
    """HTTP libraries decode and encode latin-1."""
    wire = header_bytes(name).encode("latin-1")
    assert wire == name.encode()
    assert parse(PHOTO, "", {"X-Cascade-Bundle": wire.decode("latin-1")}) == (PHOTO, Options(name))


def test_latin_1_in_headers_stays_as_it_is() -> None:
    assert header_text("b\xf6se") == "böse"
