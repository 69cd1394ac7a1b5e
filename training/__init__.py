"""Offline training: one module a stage, each runnable as `python -m training.<stage>`."""
