"""TLS with certificates made here: HTTP and gRPC, renewal, files that make no sense, handshakes that never end."""

import asyncio
import shutil
import socket
import ssl
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cascade.engine.batcher import Batcher
from cascade.engine.engine import Engine
from cascade.errors import CascadeError
from handlers.asgi import tls
from handlers.asgi.app import create_app
from handlers.asgi.service import Service
from handlers.asgi.watched import Watched
from tests.helpers import certificates
from tests.helpers.connections import answer, serving
from tests.helpers.grpc_app import serving as serving_grpc

Files = tuple[Path, Path]
GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two certificates, first and second."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("first", "second"):
        certificates.make(folder, name)
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Files:
    """The first certificate and its key, to be replaced."""
    return copy(made, "first", tmp_path)


def copy(made: Path, name: str, folder: Path) -> Files:
    cert, key = folder / "tls.crt", folder / "tls.key"
    shutil.copy(made / f"{name}.crt", cert)
    shutil.copy(made / f"{name}.key", key)
    return cert, key


def trusting(cert: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=cert)


async def get(address: tuple[str, int], cert: Path, path: str = "/") -> httpx.Response:
    async with httpx.AsyncClient(verify=trusting(cert), trust_env=False) as client:
        return await client.get(f"https://{address[0]}:{address[1]}{path}")


async def closed(address: tuple[str, int], content: bytes) -> bool:
    """Whether the server closes the connection without an answer."""
    try:
        return await answer(address, content) == b""
    except ConnectionError:
        return True


def test_requests_and_a_renewed_certificate(files: Files, made: Path) -> None:
    async def go() -> None:
        certificate = Watched(tls.read, *files)
        async with serving(certificate=certificate) as address:
            assert (await get(address, made / "first.crt")).text == "https"
            assert len((await get(address, made / "first.crt", "/large")).content) == 100_000
            with pytest.raises(httpx.ConnectError):
                await get(address, made / "second.crt")
            copy(made, "second", files[0].parent)
            certificate.refresh()
            assert (await get(address, made / "second.crt")).text == "https", "without a restart"
            many = [get(address, made / "second.crt") for _ in range(20)]
            assert {each.text for each in await asyncio.gather(*many)} == {"https"}

    asyncio.run(go())


@pytest.mark.slow
def test_handshakes_that_do_not_end_are_counted_and_closed(
    files: Files, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "SECONDS", 1.0)

    async def go() -> None:
        async with serving(most=1, certificate=Watched(tls.read, *files)) as address:
            assert await closed(address, GET), "no TLS"
            with socket.create_connection(address) as silent:
                await asyncio.sleep(0.1)
                assert await closed(address, b"\x16\x03\x01"), "one too many"
                silent.setblocking(False)
                assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(silent, 1), 20) == b""
            assert (await get(address, made / "first.crt")).text == "https"

    asyncio.run(go())


def test_old_versions_are_refused(files: Files) -> None:
    assert tls.read(*files).context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_grpc(files: Files, made: Path) -> None:
    certificate = Watched(tls.read, *files)

    def status(address: str, name: str) -> int:
        credentials = grpc.ssl_channel_credentials((made / f"{name}.crt").read_bytes())
        with grpc.secure_channel(address.replace("127.0.0.1", "localhost"), credentials) as channel:
            return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20).status)

    with (
        Batcher(Engine()) as batcher,
        serving_grpc(create_app(Service(batcher)), certificate=certificate) as address,
    ):
        assert status(address, "first") == health_pb2.HealthCheckResponse.NOT_SERVING, "it has no bundle"
        copy(made, "second", files[0].parent)
        certificate.refresh()
        assert status(address, "second") == health_pb2.HealthCheckResponse.NOT_SERVING
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)


def test_files_that_make_no_sense(files: Files, made: Path, tmp_path: Path) -> None:
    cert, key = files
    for wrong in ((tmp_path / "nothing", key), (cert, tmp_path / "nothing"), (key, cert), (cert, made / "second.key")):
        with pytest.raises(CascadeError, match="pass a PEM certificate and its key"):
            tls.read(*wrong)
    with pytest.raises(CascadeError, match=r"is encrypted: decrypt it with openssl pkey"):
        tls.read(cert, certificates.encrypted(key))
    assert key.read_text() not in repr(tls.read(cert, key)) and "PRIVATE" not in repr(tls.read(cert, key))
