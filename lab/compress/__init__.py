"""Smaller models: integer weights."""
