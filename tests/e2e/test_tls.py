"""The ASGI server with a certificate: HTTP, gRPC, the health check, and a renewal while it serves."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tritonclient import grpc as triton

from cascade import Client, Options, Prediction
from cascade.bundle.format import write
from cascade.client import ClientError
from handlers import health
from handlers.torchserve.entrypoint import LOOPBACK, claim_ports
from tests.helpers import certificates
from tests.helpers.asgi_server import serving_asgi
from tests.helpers.bundles import handmade
from tests.helpers.torments import settled

pytestmark = pytest.mark.e2e


def test_everything_is_encrypted_and_a_renewal_needs_no_restart(cifar: list[Image.Image], tmp_path: Path) -> None:
    write(handmade(cifar[:20], size=32), tmp_path / "store" / "birds" / "1")
    cifar[0].save(file := tmp_path / "one.png")
    cert, key = certificates.make(tmp_path)
    (port,) = claim_ports((LOOPBACK, 0))
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--grpc-port", str(port))
    with serving_asgi(tmp_path / "store", *options) as server:
        url = server.base.replace("http:", "https:")
        with Client(url, ca=cert) as client:
            answer = client.predict(file, Options("birds"))
            assert isinstance(answer, Prediction)
        image = triton.InferInput("image", [1], "BYTES")
        image.set_data_from_numpy(np.array([file.read_bytes()], np.object_))
        with triton.InferenceServerClient(f"localhost:{port}", ssl=True, root_certificates=str(cert)) as grpc:
            assert grpc.infer("birds", [image]).as_numpy("cluster").tolist() == [answer.cluster]
        (closed,) = claim_ports((LOOPBACK, 0))
        assert health.not_ready_reason(server.address[1], closed, "https") is None
        with Client(server.base) as plain, pytest.raises(ClientError):
            plain.models()
        certificates.make(tmp_path)

        def renewed() -> bool:
            try:
                with Client(url, ca=cert) as client:
                    return client.models() == {"birds": ["1"]}
            except ClientError:
                return False

        assert settled(renewed, 20)
        with triton.InferenceServerClient(f"localhost:{port}", ssl=True, root_certificates=str(cert)) as grpc:
            assert grpc.is_server_ready()
