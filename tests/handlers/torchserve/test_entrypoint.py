"""What can be said before TorchServe is started; tests/e2e starts it."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from handlers.torchserve import entrypoint
from handlers.torchserve.entrypoint import LOOPBACK, Server, ServerError, claim_ports


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Looks like a store from outside; with blanks and signs that a configuration file might trip over."""
    store = tmp_path / 'a store: #1 "x"'
    store.joinpath("demo", "1").mkdir(parents=True)
    store.joinpath("demo", "1", "cascade.json").write_text("{}")
    return store


def test_free_ports_differ_and_are_free() -> None:
    ports = claim_ports(*[(LOOPBACK, 0)] * 20)
    assert len(set(ports)) == 20
    assert claim_ports(*[(LOOPBACK, port) for port in ports]) == ports


def test_port_in_use_is_one_line(store: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"127.0.0.1:{port} .*in use.*choose another") as e:
            Server(store, port=port)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("host", "port"), [("203.0.113.1", 0), ("no such host", 0), (LOOPBACK, 70_000)])
def test_addresses_that_are_none_of_ours(host: str, port: int) -> None:
    with pytest.raises(ServerError, match="choose another address or port"):
        claim_ports((host, port))


def test_store_without_a_bundle(tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ServerError, match="no bundle in .*cascade.json"):
            Server(missing)


def test_log_level_that_is_none(store: Path) -> None:
    with pytest.raises(ServerError, match="choose one of debug, info"):
        Server(store, log_level="loud")


def test_configuration_is_filled_in_and_closed(store: Path, tmp_path: Path) -> None:
    server = Server(
        store,
        host="0.0.0.0",
        workers=2,
        budget_bytes=10**8,
        threads=1,
        pins={"demo": "3"},
        keep_unknown=tmp_path / "unknown",
        keep_images=9,
    )
    server.folder = tmp_path
    server._fill_folder()
    lines = (tmp_path / "config.properties").read_text().splitlines()
    config = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert config["inference_address"].startswith("http://0.0.0.0:")
    assert config["management_address"].startswith("http://127.0.0.1:")
    assert config["grpc_inference_address"] == config["grpc_management_address"] == LOOPBACK
    assert config["enable_model_api"] == config["enable_envvars_config"] == "false"
    assert config["disable_token_authorization"] == "false"
    assert config["allowed_urls"] == f"file://{tmp_path}/nothing/.*"
    model = tmp_path / "models" / "cascade"
    settings = yaml.safe_load((model / "model-config.yaml").read_text())
    assert settings["minWorkers"] == settings["maxWorkers"] == 2
    assert settings["cascade"] == {
        "model_store": str(store),
        "budget_bytes": 10**8,
        "memory_bytes": None,
        "pins": {"demo": "3"},
        "poll": 10.0,
        "on_demand": False,
        "keep_unknown": str(tmp_path / "unknown"),
        "keep_images": 9,
        "keep_bytes": 2**28,
        "log_level": "warning",
        "device": "cpu",
        "threads": 1,
        "gate": str(tmp_path / "gate"),
        "failures": str(tmp_path / "failures"),
    }
    manifest = json.loads((model / "MAR-INF" / "MANIFEST.json").read_text())
    assert (model / manifest["model"]["configFile"]).exists()


def test_what_java_logs_of_requests_does_not_quote_them() -> None:
    root = ElementTree.parse(entrypoint.HERE / "log4j2.xml").getroot()
    assert root.tag == "Configuration"
    appenders = {each.get("name"): each for each in root.findall("Appenders/Console")}
    for name in ("org.pytorch.serve.http", "io.netty"):
        (logger,) = (each for each in root.findall("Loggers/Logger") if each.get("name") == name)
        assert logger.get("additivity") == "false"
        for reference in logger.findall("AppenderRef"):
            pattern = str(appenders[reference.get("ref")].find("PatternLayout").get("pattern"))  # type: ignore[union-attr]
            assert "%m" not in pattern and "message}" not in pattern


def test_temporary_folder_too_deep_for_a_socket(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(ServerError, match="set TMPDIR to a shorter"), Server(store):
        pass
    assert list(deep.iterdir()) == []


def test_the_supervising_process_needs_no_torch() -> None:
    """Its workers have it; it would take a quarter of a gigabyte and seconds at the start, also of the demo."""
    program = "import sys, handlers.demo; print(sorted({'torch', 'timm', 'fastapi'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
