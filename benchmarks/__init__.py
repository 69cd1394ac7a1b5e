"""Measurements: ``python -m benchmarks.<what>`` prints a table to read and, as its last line, one JSON object."""

import cascade  # noqa: F401  before torch: it says how OpenMP's threads wait
