"""Management over HTTP, by Triton's own client: what an admin may do, what others may not, and uploads."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from PIL import Image

from cascade import Engine, Options
from cascade.bundle.archive import pack
from cascade.bundle.format import read, write
from cascade.engine.batcher import Batcher
from cascade.engine.registry import Registry
from cascade.engine.stores import load_store
from handlers.asgi.app import create_app
from handlers.asgi.keys import Keys
from handlers.asgi.service import Service
from tests.helpers.asgi_app import LIMITS
from tests.helpers.bundles import handmade, named
from tests.helpers.keys import digest

ADMIN, CUSTOMER = ({"Authorization": f"Bearer {key}"} for key in ("admin", "customer"))


@dataclass
class Managed:
    """A server over the store in ``folder``, with an admin's and a customer's key."""

    folder: Path
    registry: Registry
    service: Service
    address: str

    def call(self, method: str, path: str, headers: dict[str, str] = ADMIN, content: bytes = b"") -> httpx.Response:
        return httpx.request(method, f"http://{self.address}{path}", headers=headers, content=content, timeout=60)

    def put(self, path: str, content: bytes) -> tuple[int, str]:
        """Status, and the state or the kind of the error."""
        answer = self.call("PUT", f"/v2/repository/models/{path}", content=content)
        body = answer.json()
        return answer.status_code, body["error"].partition(":")[0] if "error" in body else body["state"]


@contextmanager
def serving(application: object) -> Iterator[str]:
    """Serve in a thread; yields host and port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(application, lifespan="off", log_config=None))  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield "{}:{}".format(*listening.getsockname())
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def packed(cifar: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("packed")
    bundle = handmade(cifar[:20], mask_from=3, size=32)
    return pack(write(bundle, folder / "hand" / "1"), folder / "file").read_bytes()


@pytest.fixture
def managed(cifar: list[Image.Image], tmp_path: Path) -> Iterator[Managed]:
    bundle = handmade(cifar[:20], mask_from=3, size=32)
    for name, version in (("birds", "1"), ("birds", "2"), ("ships", "1")):
        write(named(bundle, name, version), tmp_path / "store" / name / version)
    admin, customer = (bytes.fromhex(digest(key)) for key in ("admin", "customer"))
    keys = Keys((("*", admin), ("*", customer)), admins=frozenset([admin]))
    engine = Engine()
    registry = load_store(engine, tmp_path / "store")
    with Batcher(engine) as batcher:
        service = Service(batcher, keys, LIMITS, registry)
        with serving(create_app(service, registry=registry)) as address:
            yield Managed(tmp_path / "store", registry, service, address)


def test_unmodified_tritonclient_drives_it(managed: Managed) -> None:
    from tritonclient import http
    from tritonclient.utils import InferenceServerException

    client = http.InferenceServerClient(managed.address)
    try:
        assert "model_repository" in client.get_server_metadata()["extensions"]
        index = client.get_model_repository_index(headers=ADMIN)
        assert [(e["name"], e["version"], e["state"]) for e in index] == [
            ("birds", "1", "READY"),
            ("birds", "2", "READY"),
            ("ships", "1", "READY"),
        ]
        client.unload_model("birds", headers=ADMIN)
        assert not client.is_model_ready("birds", headers=ADMIN) and client.is_model_ready("ships", headers=ADMIN)
        states = {e["name"]: (e["state"], e["reason"]) for e in client.get_model_repository_index(headers=ADMIN)}
        assert states == {"birds": ("UNAVAILABLE", "unloaded"), "ships": ("READY", "")}
        managed.registry.reload()
        assert not client.is_model_ready("birds", headers=ADMIN), "a look at the store does not bring it back"
        client.load_model("birds", headers=ADMIN)
        assert client.is_model_ready("birds", "2", headers=ADMIN)
        with pytest.raises(InferenceServerException, match="unknown_bundle"):
            client.load_model("nothing", headers=ADMIN)
        with pytest.raises(InferenceServerException, match="parameters are not taken"):
            client.load_model("birds", headers=ADMIN, config="{}")
        assert all(
            e["inference_count"] == 0 for e in client.get_inference_statistics("birds", headers=ADMIN)["model_stats"]
        )
    finally:
        client.close()


def test_statistics(managed: Managed, cifar: list[Image.Image]) -> None:
    for future in managed.service.batcher.submit_all(cifar[:3], Options("birds", "1")):
        assert future.result(30).ok
    for path in ("/v2/models/birds/versions/1/stats", "/v2/models/birds/stats"):
        first = managed.call("GET", path, CUSTOMER).json()["model_stats"][0]
        assert (first["name"], first["version"], first["inference_count"]) == ("birds", "1", 3)
        assert 1 <= first["execution_count"] <= 3 and first["last_inference"] > 1.6e12
        stats = first["inference_stats"]
        assert stats["success"]["count"] == stats["queue"]["count"] == 3 and stats["fail"]["count"] == 0
        assert stats["success"]["ns"] >= stats["compute_infer"]["ns"] > 0
    assert managed.call("GET", "/v2/models/nothing/stats", CUSTOMER).status_code == 404


def test_it_is_closed_to_others_and_off_without_an_admin(managed: Managed, packed: bytes) -> None:
    calls = [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/birds/load"),
        ("POST", "/v2/repository/models/birds/unload"),
        ("PUT", "/v2/repository/models/birds/versions/3"),
        *[(method, "/v2/repository/models/birds/pin") for method in ("GET", "PUT", "DELETE")],
    ]
    for method, path in calls:
        assert managed.call(method, path, CUSTOMER, packed).status_code == 403
        assert managed.call(method, path, {}, packed).status_code == 401
    for keys in (Keys(managed.service.keys.pairs), None) if managed.service.keys else ():
        managed.service.keys = keys
        for method, path in calls:
            answer = managed.call(method, path, ADMIN, packed)
            assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (404, "management_off")
    assert {s.state for s in managed.registry.states()} == {"ready"}
    assert not (managed.folder / "birds" / "3").exists()


def test_pins(managed: Managed, caplog: pytest.LogCaptureFixture) -> None:
    path = "/v2/repository/models/birds/pin"

    def versions() -> set[str]:
        return {managed.service.engine.find("birds").version for _ in range(200)}  # type: ignore[union-attr]

    assert managed.call("GET", path).json() == {"name": "birds", "pin": None} and versions() == {"2"}
    answer = managed.call("PUT", path, content=b'{"pin": "1:50,2:50"}')
    assert answer.json() == {"name": "birds", "pin": "1:50,2:50"} == managed.call("GET", path).json()
    assert versions() == {"1", "2"} and "pin birds to 1:50,2:50: asked for by key-" in caplog.text
    assert managed.call("PUT", path, content=b'{"pin": "1"}').status_code == 200 and versions() == {"1"}
    for wrong in (b"", b'{"pin": 1}', b'{"pin": "9"}', b'{"pin": "1:x"}', b"[]"):
        answer = managed.call("PUT", path, content=wrong)
        assert answer.status_code == 400 and answer.json()["error"].startswith("bad_request")
    assert versions() == {"1"}
    assert managed.call("DELETE", path).json() == {"name": "birds", "pin": None} and versions() == {"2"}
    assert managed.call("PUT", path.replace("birds", "cats"), content=b'{"pin": "1"}').status_code == 404


def test_upload(managed: Managed, packed: bytes) -> None:
    assert managed.put("new/versions/1", packed) == (200, "READY")
    assert read(managed.folder / "new" / "1").masks
    assert managed.call("GET", "/v2/models/new/ready", CUSTOMER).status_code == 200
    assert managed.put("new/versions/1", packed) == (409, "version_exists")
    assert managed.put("birds/versions/3", packed) == (200, "READY")


def test_uploads_that_are_no_bundle_leave_nothing(managed: Managed, packed: bytes) -> None:
    damaged = packed[:500] + bytes([packed[500] ^ 1]) + packed[501:]
    for content in (b"", b"nonsense", packed[:-1], damaged):
        assert managed.put("new/versions/1", content) == (400, "bad_bundle")
    assert managed.put("new/versions/1", packed + bytes(LIMITS.body)) == (413, "body_too_large")
    for path in ("..%2Fbirds/versions/1", ".new/versions/1", "new/versions/.1", "new/versions/a%00b"):
        assert managed.put(path, packed)[0] in (400, 404)
    assert sorted(p.name for p in managed.folder.iterdir() if [*p.iterdir()]) == ["birds", "ships"]
    assert managed.call("GET", "/v2/models/new/ready", CUSTOMER).status_code == 404
