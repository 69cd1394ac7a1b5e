"""TorchServe in front of the engine: the handler for its workers, and an entrypoint that starts and stops it."""
