"""API keys: who may use which bundle, and files that make no sense."""

from pathlib import Path

import pytest

from cascade.engine.tenants import Tenant
from cascade.errors import CascadeError
from handlers.asgi import key_file as keys
from handlers.asgi.keys import MISSING, UNKNOWN, Caller, Keys
from tests.helpers.keys import digest


@pytest.fixture
def opened(tmp_path: Path) -> Keys:
    lines = [
        "# who has what",
        f"birds {digest('one')}",
        "",
        f"ships\t{digest('one').upper()}   # the same caller",
        f"birds {digest('two')}",
        f"* {digest('all')}",
    ]
    path = tmp_path / "keys"
    path.write_text("\n".join(lines))
    return keys.read(path)


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("Bearer one", {"birds", "ships"}),
        ("bearer two", {"birds"}),
        ("Bearer all", {"*"}),
        ("Bearer three", UNKNOWN),
        ("Bearer " + digest("one"), UNKNOWN),
        ("Bearer \xe9\u20ac", UNKNOWN),
        ("Bearer", MISSING),
        ("Bearer ", MISSING),
        ("Basic one", MISSING),
        ("one", MISSING),
        ("", MISSING),
        (None, MISSING),
    ],
)
def test_allowed(opened: Keys, header: str | None, allowed: object) -> None:
    assert opened.allowed(header) == allowed


def test_limits_of_tenants(tmp_path: Path) -> None:
    lines = [
        f"birds {digest('one')} name=acme weight=2 rate=50.5 priority=batch",
        f"ships {digest('one')} concurrency=8 weight=2",
        f"birds {digest('two')} name=acme queued=64",
        f"* {digest('ops')}   name=ops role=admin  # runs it",
        f"birds {digest('three')}",
    ]
    path = tmp_path / "keys"
    path.write_text("\n".join(lines))
    read = keys.read(path)
    one, two, ops, three = (read.caller(f"Bearer {key}") for key in ("one", "two", "ops", "three"))
    assert isinstance(one, Caller) and isinstance(two, Caller) and isinstance(ops, Caller) and isinstance(three, Caller)
    assert one.tenant == Tenant("acme", 2, "batch", 50.5, 8, 64) == two.tenant, "one customer with two keys"
    assert one.bundles == {"birds", "ships"} and two.bundles == {"birds"}
    assert ops == Caller(frozenset("*"), Tenant("ops"), admin=True) and not one.admin
    assert three.tenant == Tenant(f"key-{digest('three')[:8]}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("secret=1", "line 1: options are name, role, weight"),
        ("weight=0", "line 1: weight is a number from 0.1 to 10"),
        ("weight=nan", "weight is a number"),
        ("rate=secret", "rate is a number"),
        ("queued=0", "queued is a whole number"),
        ("queued=1.5", "queued is a whole number"),
        ("concurrency=99999999999", "concurrency is a whole number"),
        ("priority=secret", "priority is interactive or batch"),
        ("role=secret", "role is admin"),
        ("role=admin", "role=admin needs the bundle"),
        ("name=a/b", "name is up to 64 letters"),
        (f"weight=1\nships {digest('one')} weight=2", "line 2: another line gives this tenant another weight"),
        (f"name=a\nships {digest('one')} name=b", "line 2: another line gives this tenant another name"),
        (f"name=a rate=1\nships {digest('two')} name=a rate=2", "another line gives this tenant another rate"),
    ],
)
def test_limits_that_make_no_sense(tmp_path: Path, options: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"birds {digest('one')} {options}\n")
    with pytest.raises(CascadeError, match=message) as e:
        keys.read(path)
    assert "secret" not in str(e.value), "what is there may be a key"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# nothing\n", "has no key"),
        (f"birds {digest('one')}\nbirds secret", "line 2: write BUNDLE"),
        (digest("one"), "line 1"),
        (f"birds {digest('one')[:-1]}", "line 1"),
        (f"birds {digest('one')} more", "line 1"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(CascadeError, match=message) as e:
        keys.read(path)
    assert "secret" not in str(e.value), "what stands there may be a key"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="cannot be read"):
        keys.read(tmp_path / "keys")
