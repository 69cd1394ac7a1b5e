"""Batch prediction: sources, jobs, reports and the index."""
