"""Options of ``cascade serve``: each front end uses all that it is given, and none lets others in unasked."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cascade.cli.main import app
from handlers.settings import AsgiSettings, RaySettings, SettingsError, TorchServeSettings, is_loopback

OURS = {
    "asgi": [
        "--index",
        "i",
        "--connections",
        "9",
        "--keep-alive",
        "9",
        "--startup-timeout",
        "9",
        "--tls-cert",
        "c",
        "--tls-key",
        "k",
    ],
    "torchserve": ["--metrics-port", "9", "--management-port", "9", "--token-file", "t", "--startup-timeout", "9"],
    "ray": ["--on-demand"],
}
BATCHING = ["--api-keys", "k", "--allowed-host", "a", "--max-batch", "9", "--patience", "1", "--queue", "9"]
BATCHING += ["--time-slice", "1", "--cors-origin", "https://a.example", "--cors-origin", "http://localhost:3000"]
KEEPING = ["--keep-unknown", "u", "--keep-images", "9", "--keep-bytes", "10"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each front end is started with."""
    from handlers.asgi import supervisor
    from handlers.torchserve import entrypoint

    calls: list[Any] = []
    monkeypatch.setattr(supervisor, "serve", calls.append)
    monkeypatch.setattr(entrypoint, "serve", lambda **options: calls.append(options))
    return calls


def test_asgi_is_the_default(started: list[Any]) -> None:
    assert run().exit_code == 0
    assert started == [AsgiSettings()]
    given = ["--port", "9", "--budget", "5", "--memory", "6", "--threads", "2", "--drain", "3", "--log-level", "error"]
    assert run(*given, *OURS["asgi"], *BATCHING, *KEEPING, "--pin", "a@2").exit_code == 0
    assert started[1] == AsgiSettings(
        port=9,
        budget_bytes=5,
        memory_bytes=6,
        threads=2,
        drain_timeout=3,
        log_level="error",
        pins={"a": "2"},
        index=Path("i"),
        connections=9,
        keep_alive=9,
        startup_timeout=9,
        keep_unknown=Path("u"),
        keep_images=9,
        keep_bytes=10,
        tls_cert=Path("c"),
        tls_key=Path("k"),
        allowed_hosts=("a",),
        cors_origins=("https://a.example", "http://localhost:3000"),
        api_keys=Path("k"),
        max_batch=9,
        patience=1,
        queue=9,
        time_slice=1,
    )


def test_torchserve_gets_its_own_options(started: list[Any]) -> None:
    assert run("--frontend", "torchserve", *OURS["torchserve"], *KEEPING, "--workers", "2").exit_code == 0
    (options,) = started
    assert (options["keep_unknown"], options["keep_images"], options["keep_bytes"]) == (Path("u"), 9, 10)
    assert (options["auth"], options["workers"], options["start_timeout"], options["metrics_port"]) == (True, 2, 9, 9)
    assert run("--frontend", "torchserve", "--no-auth").exit_code == 0
    assert started[1]["auth"] is False


@pytest.mark.parametrize(
    ("frontend", "option"),
    [
        *[("asgi", option) for option in ("--metrics-port=1", "--management-port=1", "--token-file=t", "--workers=2")],
        *[("ray", option) for option in ("--metrics-port=1", "--token-file=t", "--index=i", "--connections=9")],
        *[("ray", option) for option in ("--startup-timeout=9", "--tls-cert=c")],
        *[("torchserve", option) for option in ("--api-keys=k", "--queue=1", "--index=i", "--allowed-host=a")],
        *[("torchserve", option) for option in ("--tls-cert=c", "--cors-origin=https://a.example")],
    ],
)
def test_an_option_of_another_front_end_is_an_error(started: list[Any], frontend: str, option: str) -> None:
    result = run("--frontend", frontend, option)
    assert result.exit_code == 1 and not started
    assert result.stderr == f"error: {option.partition('=')[0]} is no option of --frontend {frontend}: omit it\n"


@pytest.mark.parametrize("settings", [AsgiSettings, RaySettings])
def test_an_address_for_others_needs_keys_or_a_flag(settings: type[AsgiSettings]) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "cascade.example"):
        with pytest.raises(SettingsError, match="--api-keys"):
            settings(host=host)
        settings(host=host, no_auth=True)
        settings(host=host, api_keys=Path("keys"))
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert is_loopback(host)
        settings(host=host)
    with pytest.raises(SettingsError, match="contradict"):
        settings(no_auth=True, api_keys=Path("keys"))


@pytest.mark.parametrize("settings", [AsgiSettings, RaySettings])
def test_hosts(settings: type[AsgiSettings]) -> None:
    assert settings().hosts == {"localhost", "127.0.0.1", "::1"}
    assert settings(allowed_hosts=("Box.example",)).hosts == {"localhost", "127.0.0.1", "::1", "box.example"}
    assert settings(api_keys=Path("keys")).hosts is None
    assert settings(host="0.0.0.0", no_auth=True).hosts is None


def test_tls_needs_both_files() -> None:
    for files in ({"tls_cert": Path("c")}, {"tls_key": Path("k")}):
        with pytest.raises(SettingsError, match="both --tls-cert and --tls-key"):
            AsgiSettings(**files)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [AsgiSettings, RaySettings])
def test_origins(settings: type[AsgiSettings]) -> None:
    settings(cors_origins=("https://app.example", "http://localhost:3000", "http://[::1]:8000"))
    for wrong in ("*", "null", "app.example", "https://app.example/", "https://App.example", "https://*.example", ""):
        with pytest.raises(SettingsError, match="is no origin"):
            settings(cors_origins=(wrong,))


def test_torchserve_has_tokens_everywhere() -> None:
    assert not TorchServeSettings(host="0.0.0.0").no_auth
