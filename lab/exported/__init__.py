"""A trained model as one pure function in a file: jax.export (StableHLO) and ONNX."""
