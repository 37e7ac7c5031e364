"""Where lab runs: the accelerator, the Python environment, the variables. Standard library only."""
