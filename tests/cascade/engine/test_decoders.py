"""The processor time of an image, where a whole batch is decoded."""

import threading

from cascade import ItemError, Options
from cascade.engine.decoders import Decoders
from cascade.engine.items import Item
from tests.helpers.metrics import now


def test_a_costly_image_of_a_batch_gets_its_error() -> None:
    """The one of the limits, however it was found out; the others keep their places."""
    stop = threading.Event()

    def prepare(image: bytes, options: Options) -> Item | ItemError:
        while image == b"costly" and not stop.is_set():
            pass
        return ItemError("empty", image.decode())

    before = now("requests_total", bundle="unknown", cluster="none", outcome="too_complex")
    decoders = Decoders(2, cpu_seconds=0.05)
    try:
        found = decoders.map(prepare, [b"a", b"costly", b"b"], [Options()] * 3)
    finally:
        stop.set()
        decoders.close()
    assert [each.message for each in found if isinstance(each, ItemError) and each.kind == "empty"] == ["a", "b"]
    assert isinstance(found[1], ItemError) and found[1].kind == "too_complex"
    assert "more than 0.05 s to decode" in found[1].message
    assert now("requests_total", bundle="unknown", cluster="none", outcome="too_complex") == before + 1
