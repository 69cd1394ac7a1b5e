"""What the nearest rows of each row say: near-duplicates and outliers."""

from typing import TYPE_CHECKING

import numpy as np

from cascade.offline.index.memory import Index

if TYPE_CHECKING:
    import pyarrow as pa

NEAREST = 32  # rows that each row is compared with for duplicates
BLOCK = 1024  # rows that are searched for at a time


def duplicates(index: Index, threshold: float = 0.98) -> "pa.Table":
    """Groups of near-duplicates: connected components of pairs with a cosine similarity of at least ``threshold``.

    Returns:
        group (0 is the largest), id, path, similarity to the group's first image; in the order of the groups.
    """
    import pyarrow as pa
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    left, right = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for first, block in index.chunks(BLOCK):
        similarities, ids = index.nearest(block, NEAREST)
        query, place = np.nonzero((similarities >= threshold) & (ids >= 0))
        left.append(first + query)
        right.append(index.rows_of(ids[query, place]))
    pairs = np.concatenate(left), np.concatenate(right)
    links = coo_array((np.ones(len(pairs[0]), bool), pairs), shape=(index.about.rows, index.about.rows))
    count, component = connected_components(links, directed=False)
    order = np.argsort(component, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(component, minlength=count))[:-1])
    members = sorted((g for g in groups if len(g) > 1), key=lambda group: (-len(group), group[0]))
    numbers, rows, similarities_to = [], [], []
    for number, group in enumerate(members):
        vectors = index.vectors.reconstruct_batch(index.ids[group])
        numbers += [number] * len(group)
        rows += group.tolist()
        similarities_to += (vectors @ vectors[0]).clip(-1, 1).tolist()
    found = index.rows.take(pa.array(rows, pa.int64()))
    columns = [pa.array(numbers, pa.int64()), found["id"], found["path"], pa.array(similarities_to, pa.float32())]
    return pa.table(columns, names=["group", "id", "path", "similarity"])


def outliers(index: Index, top: int = 100, k: int = 10) -> "pa.Table":
    """The images that are farthest from all others.

    Returns:
        path, distance (1 minus the mean cosine similarity to the ``k`` nearest others), and the other columns of the
        index; farthest first.
    """
    import pyarrow as pa

    distances = np.zeros(index.about.rows, np.float32)
    for first, block in index.chunks(BLOCK):
        similarities, ids = index.nearest(block, k + 1)
        own = ids == index.ids[first : first + len(block), None]
        own[~own.any(1), -1] = True  # its own row may be missing among more than k equal ones
        others = np.where(ids >= 0, similarities, -1)[~own].reshape(len(block), -1)
        distances[first : first + len(block)] = 1 - others.mean(1) if others.shape[1] else 0
    order = np.argsort(-distances, kind="stable")[:top]
    found = index.rows.take(pa.array(order))
    names = ["path", "distance", *(name for name in found.column_names if name != "path")]
    return found.append_column("distance", pa.array(distances[order])).select(names)
