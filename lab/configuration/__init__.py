"""What makes an experiment a value: types, checks, JSON."""
