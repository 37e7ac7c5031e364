"""The accelerator, Python environment and variables that lab runs with. Standard library only."""
