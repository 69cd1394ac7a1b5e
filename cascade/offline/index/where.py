"""Conditions on the columns of an index: ``price<10``, ``category=shoes``, ``path~holiday/``.

A condition is a column, an operator (= != < <= > >= and ~, "contains") and a value of the column's type. A row without
a value in that column never fits. Several conditions must all hold.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.errors import CascadeError

if TYPE_CHECKING:
    import pyarrow as pa

CONDITION = re.compile(r"\s*([^=!<>~]*[^=!<>~\s])\s*(!=|<=|>=|=|<|>|~)\s*(.*)", re.DOTALL)
MOST = 16
"""Conditions of one search."""
FUNCTIONS = {
    "=": "equal",
    "!=": "not_equal",
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}


def matching(rows: "pa.Table", conditions: Sequence[str]) -> np.ndarray:
    """The ids, int64 ascending, of the rows that fit all conditions.

    Raises:
        CascadeError: a condition is malformed, or names no column.
    """
    import pyarrow.compute as pc

    if len(conditions) > MOST:
        raise CascadeError(f"{len(conditions)} conditions: at most {MOST} are possible")
    fits = pc.is_valid(rows["id"])
    for condition in conditions:
        fits = pc.and_(fits, pc.fill_null(_fits(rows, condition), False))
    ids: np.ndarray = rows["id"].filter(fits).to_numpy()
    return ids


def _fits(rows: "pa.Table", condition: str) -> Any:
    """Whether each row fits one condition; null where it has no value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parsed = CONDITION.fullmatch(condition)
    if parsed is None:
        raise CascadeError(f"{condition[:80]!r} is no condition: write for example price<10 or category=shoes")
    name, operator, text = parsed.groups()
    if name not in rows.column_names:
        raise CascadeError(f"the index has no column {name[:80]!r}: choose one of {', '.join(rows.column_names)}")
    column = rows[name]
    if operator == "~":
        if not pa.types.is_string(column.type):
            raise CascadeError(f"column {name} has no text: ~ is for text")
        return pc.match_substring(column, text)
    try:
        value = pa.scalar(text, pa.string()).cast(column.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise CascadeError(f"{text[:80]!r} does not fit column {name}, which has the type {column.type}") from None
    return getattr(pc, FUNCTIONS[operator])(column, value)
