"""Requests of the Open Inference Protocol: answers equal to the engine's, and one error for whatever makes no sense."""

import base64
import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade import Engine
from cascade.open_inference import LENGTH_HEADER
from handlers.asgi import open_inference
from tests.helpers.answers import embeddings
from tests.helpers.asgi_app import Ask, binary, error, expected, outputs


def test_binary_and_json_give_the_engines_answers(ask: Ask, engine: Engine, files: list[bytes]) -> None:
    want = expected(engine, files, bundle="birds", version="1")
    path = "/v2/models/birds/versions/1/infer"
    texts = [base64.b64encode(each).decode() for each in files]
    plain = {"id": "7", "inputs": [{"name": "image", "shape": [6], "datatype": "BYTES", "data": texts}]}
    nested = {"inputs": [{"name": "image", "shape": [6, 1], "datatype": "BYTES", "data": [[t] for t in texts]}]}
    answers = [ask("POST", path, **each) for each in ({"json": plain}, {"json": nested}, binary(files))]
    assert answers[0].json()["id"] == "7" and answers[0].json()["model_version"] == "1"
    for got in map(outputs, answers):
        assert list(got) == ["cluster", "confidence", "ood", "embedding", "label", "error"]
        assert got["cluster"].tolist() == [each.cluster for each in want]
        np.testing.assert_allclose(got["confidence"], [each.confidence for each in want], atol=1e-3)
        np.testing.assert_allclose(got["embedding"], embeddings(want), atol=1e-3)
        assert got["label"] == [each.labels[0].name for each in want]
        assert got["error"] == [""] * 6


def test_pixels(ask: Ask, engine: Engine, files: list[bytes], cifar: list[Image.Image]) -> None:
    bundle = engine.find("birds", "1")
    transform = bundle.preprocessing.transform()  # type: ignore[union-attr]
    pixels = torch.stack([transform(image) for image in cifar[:2]]).numpy()
    want = [each.cluster for each in expected(engine, files[:2], bundle="birds")]
    about = {"name": "pixels", "shape": list(pixels.shape), "datatype": "FP32"}
    flat, nested = (about | {"data": data} for data in (pixels.ravel().tolist(), pixels.tolist()))
    for document in (flat, nested):
        got = outputs(ask("POST", "/v2/models/birds/infer", json={"inputs": [document]}))
        assert got["cluster"].tolist() == want and got["error"] == ["", ""]
    text = json.dumps({"inputs": [about | {"parameters": {"binary_data_size": pixels.nbytes}}]}).encode()
    headers = {LENGTH_HEADER: str(len(text))}
    got = outputs(ask("POST", "/v2/models/birds/infer", content=text + pixels.tobytes(), headers=headers))
    assert got["cluster"].tolist() == want
    for wrong in (np.nan, np.inf, 1e30):
        broken = pixels.copy()
        broken[0, 0, 0, 0] = wrong
        got = outputs(ask("POST", "/v2/models/birds/infer", content=text + broken.tobytes(), headers=headers))
        assert got["error"][0].startswith("400 bad_pixels: ") and got["error"][1] == ""
    small = {"name": "pixels", "shape": [1, 3, 2, 2], "datatype": "FP32", "data": [0] * 12}
    got = outputs(ask("POST", "/v2/models/birds/infer", json={"inputs": [small]}))
    assert "takes float32 [3, 32, 32]" in got["error"][0]


def test_a_bad_image_has_its_own_error(ask: Ask, files: list[bytes]) -> None:
    got = outputs(ask("POST", "/v2/models/birds/infer", **binary([files[0], b"no image", files[1]])))
    assert got["cluster"][1] == -1 and min(got["cluster"][::2]) >= 0
    assert [text[:17] for text in got["error"]] == ["", "400 not_an_image:", ""]
    assert got["label"][1] == "" and not got["embedding"][1].any() and got["embedding"][0].any()


def test_outputs_and_mode_are_chosen(ask: Ask, engine: Engine, files: list[bytes]) -> None:
    wish = [{"name": "embedding", "parameters": {"binary_data": False}}, {"name": "cluster"}]
    more = {"outputs": wish, "parameters": {"binary_data_output": True, "mode": "dispatcher"}}
    answer = ask("POST", "/v2/models/birds/infer", **binary(files[:2], **more))
    got = outputs(answer)
    assert list(got) == ["embedding", "cluster"] and b'"data":[' in answer.content
    want = expected(engine, files[:2], bundle="birds", mode="dispatcher")
    np.testing.assert_allclose(got["embedding"], embeddings(want), atol=1e-3)
    bad = ask("POST", "/v2/models/birds/infer", **binary(files[:1], parameters={"mode": "best"}))
    assert outputs(bad)["error"][0].startswith("400 unknown_mode: ")


def image(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["AAAA"]} | changes]}


def pixels(**changes: Any) -> dict[str, Any]:
    whole = {"name": "pixels", "shape": [1, 3, 1, 1], "datatype": "FP32", "data": [0, 0, 0]}
    return {"inputs": [whole | changes]}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"inputs": []},
        {"inputs": image()["inputs"] * 2},
        {"inputs": [{}]},
        image(name="picture"),
        image(datatype="FP32"),
        image(shape=[]),
        image(shape=[0]),
        image(shape=[-1]),
        image(shape=[2]),
        image(shape=[1, 2]),
        image(shape=["one"]),
        image(data=None),
        image(data=["***"]),
        image(data=["\u20ac"]),
        image(data=[3]),
        image(data=[None]),
        image(data=[[["AAAA"]]]),
        image(data="AAAA"),
        image(parameters={"binary_data_size": 4}),
        image(data=None, parameters={"binary_data_size": 4}),
        image(parameters={"binary_data_size": "4"}),
        image(parameters={"binary_data_size": -4}),
        image() | {"outputs": [{"name": "color"}]},
        image() | {"parameters": []},
        image() | {"parameters": {"mode": 3}},
        pixels(shape=[1, 3, 1]),
        pixels(shape=[1, 4, 1, 1]),
        pixels(shape=[1, 3, 0, 1]),
        pixels(shape=[1, 3, 10**9, 10**9]),
        pixels(datatype="INT64"),
        pixels(data=["1", "2", "3"]),
        pixels(data=[[0, 0], 0]),
        pixels(data=[0, 0, None]),
        pixels(data=[0, 0]),
        pixels(data={"0": 1}),
    ],
)
def test_requests_that_make_no_sense(ask: Ask, document: Any) -> None:
    answer = ask("POST", "/v2/models/birds/infer", json=document)
    assert error(answer) == (400, "bad_request"), answer.text
    assert "\n" not in answer.json()["error"]


def test_broken_json_and_binary_data(ask: Ask, files: list[bytes]) -> None:
    def kind(content: bytes, length: str | None = None) -> tuple[int, str]:
        headers = {} if length is None else {LENGTH_HEADER: length.encode("latin-1")}
        return error(ask("POST", "/v2/models/birds/infer", content=content, headers=headers))

    for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"inputs":' + b"9" * 5000 + b"}"):
        assert kind(content) == (400, "bad_request")
    good = binary(files[:1])
    text, length = good["content"], good["headers"][LENGTH_HEADER]
    for wrong in ("-1", "x", "", "1" * 30, str(len(text) + 1), "\xb2", str(int(length) - 1)):
        assert kind(text, wrong) == (400, "bad_request")
    assert kind(text + b"more", length) == (400, "bad_request")
    assert kind(text[:-1], length) == (400, "bad_request")
    for data in (b"\x04", b"\xff\xff\xff\xff12", struct.pack("<I", 1) + b"a" + b"\x00\x00"):
        about = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
        head = json.dumps({"inputs": [about]}).encode()
        assert kind(head + data, str(len(head))) == (400, "bad_request")
    assert error(ask("POST", "/v2/models/birds/infer", **binary([b""] * 9))) == (413, "too_many_images")


@pytest.mark.parametrize(
    "document",
    [
        image() | {"id": None, "outputs": None, "parameters": None},
        image(parameters=None),
        image() | {"outputs": [{"name": "cluster", "parameters": None}]},
        image() | {"parameters": {"mode": None, "binary_data_output": None}},
    ],
)
def test_null_is_like_an_absent_field(ask: Ask, document: dict[str, Any]) -> None:
    """Clients that serialize a class with optional fields send null."""
    assert ask("POST", "/v2/models/birds/infer", json=document).status_code == 200


def test_json_of_many_values_is_not_even_parsed(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_inference, "MAX_VALUES", 1000)
    for value in (b"{},", b"[],", b"0,"):
        body = b'{"inputs":[{"name":"pixels","datatype":"FP32","shape":[1,3,1,1],"data":[' + value * 1000 + b"0]}]}"
        assert error(ask("POST", "/v2/models/birds/infer", content=body)) == (413, "json_too_large")


def test_numbers_of_thousands_of_digits(ask: Ask, files: list[bytes]) -> None:
    """Python refuses to read and write integers of over 4,300 digits."""
    big = int("9" * 4000)
    assert error(ask("POST", "/v2/models/birds/infer", json=pixels(shape=[1, 3, big, big]))) == (400, "bad_request")
    good = binary(files[:1])
    good["headers"][LENGTH_HEADER] = good["headers"][LENGTH_HEADER].zfill(5000)
    assert ask("POST", "/v2/models/birds/infer", **good).status_code == 200
