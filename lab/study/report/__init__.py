"""Reports a study: statistics, tables, pictures."""
