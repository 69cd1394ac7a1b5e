"""Bundles on disk: format, schema, validation, archive and store."""
