"""Measurements: ``python -m benchmarks.<what>`` prints a table to read and, as its last line, one JSON object."""
