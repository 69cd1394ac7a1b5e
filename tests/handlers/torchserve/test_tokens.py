"""Tokens are handed out in one step, to nobody but the owner; tests/e2e makes them anew."""

import json
import stat
from pathlib import Path

import httpx
import pytest

from handlers.torchserve.tokens import KEY_FILE, TokenError, bearer, hand_out, renew


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """TorchServe's, with its key file."""
    keys = {"inference": {"key": "in-7"}, "management": {"key": "man-7"}, "API": {"key": "api-7"}}
    (tmp_path / KEY_FILE).write_text(json.dumps(keys))
    return tmp_path


def test_bearer(folder: Path) -> None:
    assert bearer(folder, "management") == {"Authorization": "Bearer man-7"}


def test_handed_out_for_the_owner_alone(folder: Path) -> None:
    file = folder / "handed" / "token"
    file.parent.mkdir()
    for _ in range(2):
        hand_out(folder, file)
        assert file.read_text() == "in-7\n" and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_others_could_read_is_replaced(folder: Path) -> None:
    file = folder / "token"
    file.write_text("old")
    file.chmod(0o666)
    hand_out(folder, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_no_place_for_it_is_one_line(folder: Path) -> None:
    with pytest.raises(
        TokenError, match=r"cannot write the token to .*nowhere/token .*choose another --token-file"
    ) as e:
        hand_out(folder, folder / "nowhere" / "token")
    assert "\n" not in str(e.value) and "in-7" not in str(e.value)


def test_renew_asks_with_the_key_for_it(folder: Path) -> None:
    asked: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((str(request.url), request.headers["Authorization"]))
        return httpx.Response(200)

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        renew(folder, "http://127.0.0.1:8081/models/cascade", client)
    assert asked == [
        (f"http://127.0.0.1:8081/token?type={kind}", "Bearer api-7") for kind in ("inference", "management")
    ]


def test_a_refused_renewal_says_that_the_old_one_holds(folder: Path) -> None:
    refuse = httpx.MockTransport(lambda request: httpx.Response(500))
    with httpx.Client(transport=refuse) as client, pytest.raises(TokenError, match="the old one still holds") as e:
        renew(folder, "http://127.0.0.1:8081/models/cascade", client)
    assert "api-7" not in str(e.value)
