"""Feed every parser of foreign bytes with mutations: it answers or raises its own error, and nothing else.

``make soak`` gives each parser a minute; other runs take a moment. A failure prints the input's file; add such an input
to the parser's own tests.
"""

import hashlib
import io
import json
import os
import random
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from PIL import Image

from cascade.bundle import format as bundles
from cascade.bundle.archive import pack, unpack
from cascade.errors import CascadeError
from cascade.model.decoding import decode
from cascade.offline.sources import plan, read
from handlers.asgi import key_file as keys
from handlers.asgi.open_inference import Refusal, parse
from tests.helpers.bundles import handmade
from tests.helpers.photos import BYTES, tar

pytestmark = pytest.mark.slow

SECONDS = [0.5, pytest.param(60, marks=pytest.mark.soak)]
ALLOWED = (CascadeError, Refusal)
INTERESTING = (b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"-1", b"1e999", b"NaN", b"\n", b"\0" * 64)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, removed, repeated or replaced, anywhere."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(len(out) + 1)
        match draw.randrange(6):
            case 0 if place < len(out):
                out[place] ^= 1 << draw.randrange(8)
            case 1 if place < len(out):
                out[place] = draw.randrange(256)
            case 2:
                del out[place : place + draw.choice((1, 2, 8, 100))]
            case 3:
                out[place:place] = out[place : place + draw.choice((1, 8, 100))] * draw.choice((1, 2, 30))
            case 4:
                piece = draw.choice(INTERESTING)
                out[place : place + len(piece)] = piece
            case _:
                out[place:place] = draw.choice(INTERESTING)
    return bytes(out)


def fuzz(seeds: list[bytes], parser: Callable[[bytes], object], seconds: float, tmp_path: Path) -> None:
    """Parse mutations of ``seeds`` until the time is over. Each must raise ALLOWED or nothing, within ten seconds."""
    draw = random.Random(0)
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end or count < 3:
        data, count = mutated(draw.choice(seeds), draw), count + 1
        (kept := tmp_path / "fuzz-input").write_bytes(data)  # before: a crash of the process leaves it, too
        start = time.process_time()
        try:
            parser(data)
        except ALLOWED as error:
            assert "\n" not in str(error), f"{kept}: the message has several lines"
        except Exception as error:
            pytest.fail(f"{kept}, input {count}: {type(error).__name__}: {error}")
        assert time.process_time() - start < 10, f"{kept}: takes too long"


def encoded(format: str, **options: object) -> bytes:
    Image.open(io.BytesIO(BYTES[0])).convert("RGB").save(out := io.BytesIO(), format, **options)
    return out.getvalue()


@pytest.mark.parametrize("seconds", SECONDS)
def test_image(seconds: float, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs = [encoded("JPEG", exif=exif), encoded("JPEG", progressive=True)]
    fuzz([*jpegs, encoded("PNG"), encoded("WEBP"), encoded("WEBP", lossless=True), BYTES[0]], decode, seconds, tmp_path)


def images_of(path: Path) -> Callable[[bytes], object]:
    """A parser that plans and reads a source as ``cascade predict`` does."""

    def parser(data: bytes) -> None:
        if any(Path("/") in (line := Path(os.fsdecode(text).strip()), line.parent) for text in data.split(b"\n")):
            return  # a list that names folders of the machine would read all of them
        path.write_bytes(data)
        for unit in plan([path]):
            for _, load in read(unit):
                try:
                    load()
                except CascadeError:
                    continue

    return parser


@pytest.mark.parametrize("seconds", SECONDS)
def test_list(seconds: float, tmp_path: Path) -> None:
    lines = f"# images\n{tmp_path}/a.png\r\n{tmp_path}/b[1].png\n\n{tmp_path}/gone/\n"
    seeds = [lines.encode(), b"\xef\xbb\xbf" + lines.encode(), lines.encode("utf-16")]
    fuzz(seeds, images_of(tmp_path / "list.txt"), seconds, tmp_path)


@pytest.mark.parametrize("seconds", SECONDS)
def test_tar(seconds: float, tmp_path: Path) -> None:
    members = {f"{i}.png": data for i, data in enumerate(BYTES[:3])} | {"d/" * 60 + "x.png": b"x"}
    seeds = [tar(members, tarfile.GNU_FORMAT), tar(members, tarfile.PAX_FORMAT), tar({"é.png": BYTES[0]})]
    fuzz(seeds, images_of(tmp_path / "shard.tar"), seconds, tmp_path)


@pytest.mark.parametrize("seconds", SECONDS)
def test_parquet(seconds: float, tmp_path: Path) -> None:
    column = [{"bytes": data, "path": None} for data in BYTES]
    seeds = []
    for images in (column, list(BYTES)):
        pq.write_table(pa.table({"image": images}), out := io.BytesIO(), row_group_size=4)
        seeds.append(out.getvalue())
    fuzz(seeds, images_of(tmp_path / "images.parquet"), seconds, tmp_path)


@pytest.mark.parametrize("seconds", SECONDS)
def test_keys(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "keys"

    def parser(data: bytes) -> None:
        path.write_bytes(data)
        keys.read(path).allowed("Bearer x")

    lines = "".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}  # {name}\n" for name in ("a", "*", "ü"))
    fuzz([lines.encode()], parser, seconds, tmp_path)


def bundle_with(file: str, folder: Path) -> tuple[bytes, Callable[[bytes], object]]:
    """One file of a bundle, and a parser that reads the bundle with other content there and right checksums."""

    def parser(data: bytes) -> None:
        (folder / file).write_bytes(data)
        names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
        if file != "cascade.json":
            card = json.loads((folder / "cascade.json").read_text())
            card["bytes"][file] = len(data)
            (folder / "cascade.json").write_text(json.dumps(card, indent=2) + "\n")
        sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        bundles.read(folder)

    return (folder / file).read_bytes(), parser


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("file", ["cascade.json", "masks.safetensors", "fusion.safetensors", "SHA256SUMS"])
def test_bundle(file: str, seconds: float, tmp_path: Path, cifar: list[Image.Image]) -> None:
    folder = bundles.write(handmade(cifar[:40]), tmp_path / "store" / "hand" / "1")
    if file == "SHA256SUMS":
        seed = (folder / file).read_bytes()

        def parser(data: bytes) -> None:
            (folder / file).write_bytes(data)
            bundles.read(folder)
    else:
        seed, parser = bundle_with(file, folder)  # type: ignore[assignment]
    fuzz([seed], parser, seconds, tmp_path)


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("inside", [False, True])
def test_packed_bundle(inside: bool, seconds: float, tmp_path: Path, cifar: list[Image.Image]) -> None:
    """The compressed file, or the tar inside under a right checksum."""
    folder = bundles.write(handmade(cifar[:40]), tmp_path / "store" / "hand" / "1")
    seed = pack(folder, tmp_path / "packed").read_bytes()
    compressor = zstandard.ZstdCompressor(write_checksum=True, write_content_size=True)

    def parser(data: bytes) -> None:
        (tmp_path / "packed").write_bytes(compressor.compress(data) if inside else data)
        try:
            unpack(tmp_path / "packed", tmp_path / "other" / "hand" / "1")
        finally:
            shutil.rmtree(tmp_path / "other", ignore_errors=True)

    fuzz([zstandard.ZstdDecompressor().decompress(seed) if inside else seed], parser, seconds, tmp_path)


@pytest.mark.parametrize("seconds", SECONDS)
def test_v2_body(seconds: float, tmp_path: Path) -> None:
    pixels = {"name": "pixels", "shape": [1, 3, 2, 2], "datatype": "FP32", "data": [0.5] * 12}
    image = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 8}}
    plain = json.dumps({"id": "1", "inputs": [pixels], "outputs": [{"name": "labels"}]}).encode()
    binary = json.dumps({"inputs": [image], "parameters": {"mode": "dispatcher"}}).encode()

    def parser(data: bytes) -> None:
        parse(data, None, 64)
        parse(data, str(len(binary)), 64)

    fuzz([plain, binary + (4).to_bytes(4, "little") + b"data"], parser, seconds, tmp_path)
