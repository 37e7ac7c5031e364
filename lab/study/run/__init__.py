"""Runs a study: cells, workers, shared compiled programs."""
