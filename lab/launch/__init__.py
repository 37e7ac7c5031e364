"""Starts lab commands on SLURM, ssh hosts, Cloud TPU or SkyPilot."""
