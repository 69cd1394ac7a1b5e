"""Web pages of other origins: none may read answers, unless their origin is named."""

import pytest

from handlers.asgi.app import create_app
from handlers.asgi.service import Service
from tests.helpers.asgi_app import Ask, client

PAGE = "https://app.example"
ALLOWED = "access-control-allow-origin"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-cascade-mode"}


@pytest.fixture
def opened(service: Service) -> Ask:
    return client(create_app(service, origins=[PAGE, "http://localhost:3000"]))


def test_off_unless_named(ask: Ask, files: list[bytes]) -> None:
    answer = ask("POST", "/v1/predict", content=files[0], headers={"Origin": PAGE, "X-Cascade-Bundle": "birds"})
    assert answer.status_code == 200
    preflight = ask("OPTIONS", "/v1/predict", headers={"Origin": PAGE} | PREFLIGHT)
    assert preflight.status_code == 405
    assert not [name for each in (answer, preflight) for name in each.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000"])
def test_a_named_origin(opened: Ask, files: list[bytes], origin: str) -> None:
    preflight = opened("OPTIONS", "/v1/predict", headers={"Origin": origin} | PREFLIGHT)
    assert preflight.status_code == 200 and preflight.headers[ALLOWED] == origin
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    answer = opened("POST", "/v1/predict", content=files[0], headers={"Origin": origin, "X-Cascade-Bundle": "birds"})
    assert answer.json()["bundle"] == "birds" and answer.headers[ALLOWED] == origin
    assert answer.headers["access-control-expose-headers"] == "*" and "origin" in answer.headers["vary"].lower()
    assert "access-control-allow-credentials" not in answer.headers
    error = opened("GET", "/v2/models/cats", headers={"Origin": origin})
    assert error.status_code == 404 and error.headers[ALLOWED] == origin, "a page may read errors, too"


@pytest.mark.parametrize("origin", ["https://evil.example", "https://app.example.evil.example", "null"])
def test_other_origins(opened: Ask, files: list[bytes], origin: str) -> None:
    assert opened("OPTIONS", "/v1/predict", headers={"Origin": origin} | PREFLIGHT).status_code == 400
    answer = opened("POST", "/v1/predict", content=files[0], headers={"Origin": origin, "X-Cascade-Bundle": "birds"})
    assert ALLOWED not in answer.headers
