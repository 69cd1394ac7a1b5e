"""Shared by client and server of the Open Inference Protocol, version 2: outputs, and strings as binary data."""

import struct
from collections.abc import Iterator, Sequence

LENGTH_HEADER = "Inference-Header-Content-Length"
OUTPUTS = {
    "cluster": "INT64",
    "confidence": "FP32",
    "ood": "FP32",
    "embedding": "FP32",
    "label": "BYTES",
    "error": "BYTES",
}
AUTO_OUTPUTS = OUTPUTS | {"bundle": "BYTES", "bundle_confidence": "FP32"}
"""Outputs of the model ``auto``, which dispatches each image to the bundle that it fits best."""
DEFERRAL_OUTPUTS = {"input_size": "INT64", "deferred": "BOOL"}
"""Outputs of a bundle with two input sizes: the size that gave the label, and whether the image was deferred."""
ALL_OUTPUTS = AUTO_OUTPUTS | DEFERRAL_OUTPUTS
NUMPY = {"INT64": "<i8", "FP32": "<f4", "BOOL": "?"}


def packed(elements: Sequence[bytes]) -> bytes:
    """Encode a tensor of BYTES as binary data: each element is prefixed with its length, 4 bytes, little-endian."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def unpacked(data: bytes | memoryview) -> Iterator[bytes]:
    """The inverse of ``packed``. Raises ValueError if the data ends early."""
    offset = 0
    while offset < len(data):
        if offset + 4 > len(data):
            raise ValueError("the binary data ends inside a length")
        (length,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if offset + length > len(data):
            raise ValueError("an element of the binary data is longer than the data")
        yield bytes(data[offset : offset + length])
        offset += length
