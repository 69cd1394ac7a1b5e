"""FAISS's indexes by kind. Their ids are those of the rows, so vectors can be added and removed.

``IndexIDMap2`` stores the ids where the kind itself does not. A removed vector of an HNSW graph stays in it, because
others are linked through it; searches skip it, and the graph is built again when too many are dead.
"""

from typing import Any, Literal

import numpy as np

from cascade.errors import CascadeError
from cascade.model.heads import faiss

Kind = Literal["flat", "ivf", "hnsw"]
LINKS, EFFORT = 32, 128  # HNSW: links per row; rows that a search visits
TRAINING = 64  # IVF: training rows per list
DEAD = 0.2  # HNSW: share of dead vectors above which the graph is built again


def empty(kind: Kind, dim: int, rows: int) -> Any:
    """An empty index for about this number of rows; ivf must be trained."""
    module = faiss()
    product = module.METRIC_INNER_PRODUCT
    match kind:
        case "flat":
            return module.IndexIDMap2(module.IndexFlatIP(dim))
        case "hnsw":
            return module.IndexIDMap2(module.IndexHNSWFlat(dim, LINKS, product))
        case "ivf":
            quantizer = module.IndexFlatIP(dim)
            index = module.IndexIVFFlat(quantizer, dim, lists(rows), product)
            quantizer.this.disown()
            index.own_fields = True
            return index
    raise CascadeError(f"unknown kind of index {kind!r}: flat, ivf or hnsw")


def lists(rows: int) -> int:
    """Number of IVF's lists."""
    return max(1, min(65_536, int(4 * rows**0.5), rows // 39))


def remove(vectors: Any, kind: Kind, gone: np.ndarray, left: np.ndarray) -> Any:
    """The index without the ids ``gone``; ``left`` are the others. Both are int64."""
    if not len(gone):
        return vectors
    if kind != "hnsw":
        vectors.remove_ids(gone)
        return vectors
    if len(left) >= (1 - DEAD) * vectors.ntotal:
        return vectors
    rebuilt = empty(kind, vectors.d, len(left))
    rebuilt.add_with_ids(vectors.reconstruct_batch(left), left)
    return rebuilt


def make_readable(vectors: Any, kind: Kind) -> None:
    """Prepare an index for searches and ``reconstruct_batch``."""
    if kind == "ivf":
        vectors.nprobe = probes(vectors)
        vectors.set_direct_map_type(faiss().DirectMap.Hashtable)


def make_writable(vectors: Any, kind: Kind) -> None:
    """Undo ``make_readable``, because it makes ``remove_ids`` slow and the file larger."""
    if kind == "ivf":
        vectors.set_direct_map_type(faiss().DirectMap.NoMap)


def parameters(vectors: Any, kind: Kind, among: np.ndarray | None) -> Any:
    """Search parameters; with ``among``, int64 ids, other vectors are not found."""
    module = faiss()
    chosen: dict[str, Any] = {}
    if among is not None:
        bits = np.zeros(int(among.max(initial=0)) + 1, bool)
        bits[among] = True
        chosen["sel"] = module.IDSelectorBitmap(np.packbits(bits, bitorder="little"))
    match kind:
        case "hnsw":
            return module.SearchParametersHNSW(efSearch=EFFORT, **chosen)
        case "ivf" if chosen:
            return module.SearchParametersIVF(nprobe=probes(vectors), **chosen)
        case _:
            return module.SearchParameters(**chosen) if chosen else None


def probes(vectors: Any) -> int:
    """Number of IVF's lists that a search visits."""
    return max(1, vectors.nlist // 8)


def on_device(vectors: Any, kind: Kind, device: str) -> Any:
    """Copy an index to ``device``; HNSW indexes stay on the CPU."""
    module = faiss()
    if device == "cpu" or kind == "hnsw":
        return vectors
    if not getattr(module, "get_num_gpus", lambda: 0)():
        raise CascadeError("FAISS sees no GPU here: pip install 'cascade-vision[gpu]', or omit --device")
    return module.index_cpu_to_all_gpus(vectors)


def on_cpu(vectors: Any, kind: Kind, device: str) -> Any:
    """The inverse of ``on_device``."""
    return vectors if device == "cpu" or kind == "hnsw" else faiss().index_gpu_to_cpu(vectors)
