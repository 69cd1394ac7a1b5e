"""Kernels: the loops that no tensor library provides. Each is tested against a plain reference in the same package."""
