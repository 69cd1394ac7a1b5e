"""Measurements: ``python -m benchmarks.<what>`` prints a table to read and, as its last line, one JSON object."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; torch reads it when it is imported
