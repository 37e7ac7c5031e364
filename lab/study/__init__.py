"""Ablation studies: arms x seeds, statistics and the report."""
