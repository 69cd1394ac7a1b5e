"""One decoded image as an item of a pass, for a named bundle or for all that it may be dispatched to."""

from torch import Tensor

from cascade.bundle.bundle import Bundle
from cascade.engine import deferral
from cascade.engine.dispatch_table import DispatchTable
from cascade.engine.items import Item, OpenItem
from cascade.engine.pixels import Source, pixels_of
from cascade.engine.results import ItemError, Options
from cascade.model.decoding import Limits


def open_item(
    table: DispatchTable, image: Source, options: Options, limits: Limits, *, keep: bool
) -> OpenItem | ItemError:
    """The item of an image that is dispatched, or the image's error. keep: the item also holds its file."""
    again = options.mode in (None, "adaptive", "full") and not isinstance(image, Tensor)
    sizes, spaces = table.larger if again else [], [space.preprocessing for space in table.spaces]
    pixels = pixels_of(image, [*spaces, *sizes], limits)
    if isinstance(pixels, ItemError):
        return pixels
    of_larger = dict(zip(sizes, pixels[len(spaces) :], strict=True))
    file = bytes(image) if keep and isinstance(image, bytes | bytearray) else None
    return OpenItem(table, options, tuple(pixels[: len(spaces)]), of_larger, file)


def named_item(bundle: Bundle, image: Source, options: Options, limits: Limits) -> Item | ItemError:
    """The item of an image for this bundle, or the error of the image or its options."""
    mode = deferral.mode_of(bundle, options)
    if isinstance(mode, ItemError):
        return mode
    if mode == "adaptive" and isinstance(image, Tensor):
        mode = "fast"  # preprocessed pixels have one size
    wanted = deferral.preprocessings(bundle, mode)
    pixels = pixels_of(image, wanted, limits)
    if isinstance(pixels, ItemError):
        return pixels
    of = dict(zip(wanted, pixels, strict=True))
    larger = None if bundle.larger is None else of.get(bundle.larger.preprocessing)
    return deferral.item_of(bundle, mode, options, of.get(bundle.preprocessing), larger)
