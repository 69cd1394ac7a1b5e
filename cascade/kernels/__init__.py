"""Kernels: loops that no tensor library provides. Each is tested against a plain reference in this package."""
