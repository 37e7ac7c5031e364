"""The field's evaluation harness (lm-eval) on our language models, and the perplexity of a text."""

FOLDER = "evaluations"  # in a run folder
