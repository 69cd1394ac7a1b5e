"""Images for training: scan, decode, cache and augment."""
