"""The engine: one pass over resident backbones, and what it loads."""
