"""Offline training: one module per stage, each runnable as `python -m training.<stage>`."""
