"""A study carried out: cells, workers, compiled programs they share."""
