"""A functional JAX research codebase: models are pure functions, experiments are values, ablations are first-class."""
