"""Ablation studies: arms x seeds, their statistics and the report."""
