"""Kernels: the few loops that no tensor library has. Each stands beside a plain reference that it is tested against."""
