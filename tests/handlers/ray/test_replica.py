"""A replica without Serve: its settings reach the application."""

import asyncio
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
from pydantic import ValidationError

from cascade import tracing
from cascade.bundle.format import write
from cascade.engine.unknown import NAME
from handlers.settings import SettingsError
from tests.conftest import need, sheet
from tests.helpers.asgi_app import client, error
from tests.helpers.bundles import handmade, named
from tests.helpers.domains import with_domain
from tests.helpers.keys import digest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")]
ADMIN = {"Authorization": "Bearer admin"}


def test_settings_reach_the_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(find_spec("ray"), "Ray is not installed")
    from handlers.ray import replica

    images = sheet("fashion_mnist")
    bundle = with_domain(handmade(images[:20], name="clothes", experts=0, size=64), images[:200])
    for name in ("clothes", "others"):
        write(named(bundle, name), tmp_path / "store" / name / "1")
    (tmp_path / "keys").write_text(f"* {digest('admin')} role=admin\n")
    monkeypatch.setattr(replica, "log_to_stderr", lambda level: None)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    settings = replica.Settings(
        model_store=str(tmp_path / "store"),
        api_keys=str(tmp_path / "keys"),
        cors_origins=["https://app.example"],
        keep_unknown=str(tmp_path / "unknown"),
        poll=0,
    )
    made = replica.Replica.__new__(replica.Replica)
    asyncio.run(made.__init__(settings))  # type: ignore[misc]
    ask = client(made.__serve_build_asgi_app__())  # type: ignore[arg-type]
    assert tracing.begin(cold=False) is not None
    tracing.use(None)  # nobody is there to receive spans
    assert error(ask("GET", "/v1/unknown")) == (401, "key_missing")
    assert "model_repository" not in ask("GET", "/v2", headers=ADMIN).json()["extensions"]
    assert ask("POST", "/v2/repository/index", headers=ADMIN).status_code == 404
    for photo in sheet("cifar10")[200:210]:
        photo.save(out := BytesIO(), "png")
        answer = ask("POST", "/v1/predict", content=out.getvalue(), headers=ADMIN | {"Origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
    made._stack.close()
    kept = [path for path in (tmp_path / "unknown").iterdir() if NAME.fullmatch(path.name)]
    assert kept and ask("GET", "/v1/unknown", headers=ADMIN).json()["count"] == len(kept)


def test_access_without_keys_is_chosen() -> None:
    need(find_spec("ray"), "Ray is not installed")
    from handlers.ray.replica import Settings

    with pytest.raises(ValidationError, match="set api_keys; or hosts, for loopback; or no_auth"):
        Settings()
    with pytest.raises(SettingsError, match=r"'\*' is no origin of a web page"):
        Settings(no_auth=True, cors_origins=["*"])
    for chosen in ({"api_keys": "keys"}, {"hosts": ["localhost"]}, {"no_auth": True}):
        Settings(**chosen)
