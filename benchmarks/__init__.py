"""Measurements: ``python -m benchmarks.<name>`` prints a table and, on the last line, one JSON object."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; torch reads it when it is imported
