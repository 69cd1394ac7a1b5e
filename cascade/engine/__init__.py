"""The engine: forward passes over resident backbones, batching, dispatch, and loading of bundles."""
