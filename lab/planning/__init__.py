"""Compile for machines that are not here."""
