"""Certificates that are made for a test, by openssl."""

import shutil
import subprocess
from pathlib import Path

from tests.conftest import need


def make(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """A self-signed certificate for loopback and its key, as PEM files."""
    openssl = shutil.which("openssl")
    need(openssl, "openssl is missing: apt-get install openssl")
    assert openssl
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    kind = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "2"]
    about = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    run([openssl, *kind, *about, "-keyout", str(key), "-out", str(cert)])
    return cert, key


def encrypted(key: Path) -> Path:
    """The key in another file, with a password."""
    out = key.with_suffix(".encrypted")
    run(["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:word", "-out", str(out)])
    return out


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
