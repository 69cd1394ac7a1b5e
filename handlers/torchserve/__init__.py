"""TorchServe in front of the engine: the handler for its worker, and what starts and stops it."""
