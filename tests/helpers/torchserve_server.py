"""`cascade serve --frontend torchserve` in a process of its own."""

import json
import subprocess
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.torchserve.entrypoint import LOOPBACK, claim_ports
from tests.helpers.servers import CLIENT, Running, watched

SERVE = """
import json, sys
from pathlib import Path
from cascade.errors import CascadeError
from handlers.torchserve.entrypoint import serve
options = json.loads(sys.argv[2])
try:
    serve(sys.argv[1], token_file=Path(options.pop("token_file")), **options)
except CascadeError as e:
    sys.exit(f"error: {e}")
"""


@dataclass
class TorchServe(Running):
    """A TorchServe whose workers are ready."""

    management_url: str

    def keys(self) -> dict[str, dict[str, str]]:
        """TorchServe's own key file; {} without authorization."""
        files = list(self.folder.glob("cascade-*/key_file.json"))
        return dict(json.loads(files[0].read_text())) if files else {}

    def workers(self) -> list[dict[str, Any]]:
        """What TorchServe says of its workers."""
        keys = self.keys()
        headers = {"Authorization": f"Bearer {keys['management']['key']}"} if keys else {}
        (model,) = CLIENT.get(self.management_url, headers=headers).raise_for_status().json()
        return list(model["workers"])


def serving(
    store: Path | str, host: str = LOOPBACK, env: Mapping[str, str] = {}, place: str = "/tmp", **options: object
) -> AbstractContextManager[TorchServe]:
    """Run `serve` with these options, see `watched`."""
    port, metrics_port, management_port = claim_ports((host, 0), (host, 0), (LOOPBACK, 0))
    ports = {"port": port, "metrics_port": metrics_port, "management_port": management_port}

    def command(folder: Path) -> list[str]:
        rest = {"host": host, "token_file": str(folder / "token")}
        return ["-c", SERVE, str(store), json.dumps(ports | rest | options)]

    def server(process: "subprocess.Popen[str]", folder: Path) -> TorchServe:
        return TorchServe(
            f"http://{LOOPBACK}:{port}/predictions/cascade",
            f"http://{LOOPBACK}:{metrics_port}/metrics",
            process,
            folder,
            f"http://{LOOPBACK}:{management_port}/models/cascade",
        )

    return watched(command, server, env, place)
