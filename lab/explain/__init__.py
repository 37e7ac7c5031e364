"""Why a model answers as it does: attributions to its input, attention maps, and a check that they depend on the
weights. See README.md."""
