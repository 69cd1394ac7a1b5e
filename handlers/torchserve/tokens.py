"""TorchServe's tokens: who may ask for predictions, and who may look at the workers.

TorchServe makes three keys at its start and writes them to ``key_file.json`` (mode 0600) in its working folder,
which is our private one: ``inference`` opens predictions, ``management`` the state of the workers, ``API`` makes the
other two anew. Only the first is ever handed out.
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
    """Tokens cannot be written or made anew."""


def bearer(folder: Path, kind: Kind) -> dict[str, str]:
    """The header that opens one of TorchServe's doors.

    Raises:
        OSError, ValueError: there is no key file yet, or it is just being written.
    """
    return {"Authorization": f"Bearer {_key(folder, kind)}"}


def hand_out(folder: Path, file: Path) -> None:
    """Write the token for predictions to ``file``, mode 0600, in one step: a reader sees the old one or the new one.

    Raises:
        TokenError: the file cannot be written.
    """
    try:
        with atomic.file(file) as beside:
            beside.unlink(missing_ok=True)  # of a process that had our number
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                out.write(_key(folder, "inference") + "\n")
    except OSError as error:
        raise TokenError(f"cannot write the token to {file} ({error.strerror}): choose another --token-file") from None


def renew(folder: Path, management_url: str, client: httpx.Client) -> None:
    """Make the tokens for predictions and management anew; the old ones open nothing from then on.

    Raises:
        TokenError: TorchServe did not do it.
    """
    try:
        for kind in ("inference", "management"):
            url = httpx.URL(management_url).copy_with(path="/token", params={"type": kind})
            client.get(url, headers=bearer(folder, "API")).raise_for_status()
    except httpx.HTTPError as error:
        raise TokenError(f"TorchServe makes no new token ({type(error).__name__}): the old one still holds") from None


def _key(folder: Path, kind: Kind) -> str:
    return str(json.loads((folder / KEY_FILE).read_text())[kind]["key"])
