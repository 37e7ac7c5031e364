"""Start a command of lab elsewhere: SLURM, ssh hosts, Cloud TPU, SkyPilot."""
