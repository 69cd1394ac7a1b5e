"""Images that cost more than they should, and broken ones."""

import random
import struct
import zlib


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels, in a few KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (side + 7) // 8) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def mutated(image: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut out, doubled, or the end missing."""
    body = bytearray(image)
    for _ in range(draw.choice((1, 3, 30))):
        at = draw.randrange(len(body))
        match draw.randrange(4):
            case 0:
                body[at] ^= 1 << draw.randrange(8)
            case 1:
                del body[at : at + draw.randrange(1, 200)]
            case 2:
                body[at:at] = body[at : at + draw.randrange(1, 200)]
            case 3:
                body[at:] = draw.randbytes(draw.randrange(50))
        body = body or bytearray(b"\0")
    return bytes(body)
