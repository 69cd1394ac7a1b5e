"""TorchServe's tokens, for predictions and for the state of the workers.

TorchServe makes three keys when it starts and writes them to ``key_file.json`` (mode 0600) in its working folder, which
is private: ``inference`` allows predictions, ``management`` shows the state of the workers, ``API`` renews the other
two. Only the first is ever handed out.
"""

import json
import os
from pathlib import Path
from typing import Literal

import httpx

from cascade import atomic
from cascade.errors import CascadeError

KEY_FILE = "key_file.json"
Kind = Literal["inference", "management", "API"]


class TokenError(CascadeError):
    """Tokens cannot be written or renewed."""


def bearer(folder: Path, kind: Kind) -> dict[str, str]:
    """The header with one of TorchServe's keys.

    Raises:
        OSError, ValueError: there is no key file yet, or it is still being written.
    """
    return {"Authorization": f"Bearer {_key(folder, kind)}"}


def hand_out(folder: Path, file: Path) -> None:
    """Write the token for predictions to ``file`` atomically, with mode 0600.

    Raises:
        TokenError: the file cannot be written.
    """
    try:
        with atomic.file(file) as temporary:
            temporary.unlink(missing_ok=True)  # left by a dead process with the same PID
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                out.write(_key(folder, "inference") + "\n")
    except OSError as error:
        raise TokenError(f"cannot write the token to {file} ({error.strerror}): choose another --token-file") from None


def renew(folder: Path, management_url: str, client: httpx.Client) -> None:
    """Renew the tokens for predictions and management; the old ones become invalid.

    Raises:
        TokenError: TorchServe did not renew them.
    """
    try:
        for kind in ("inference", "management"):
            url = httpx.URL(management_url).copy_with(path="/token", params={"type": kind})
            client.get(url, headers=bearer(folder, "API")).raise_for_status()
    except httpx.HTTPError as error:
        raise TokenError(f"TorchServe makes no new token ({type(error).__name__}): the old one still holds") from None


def _key(folder: Path, kind: Kind) -> str:
    return str(json.loads((folder / KEY_FILE).read_text())[kind]["key"])
