"""What a study found: statistics, tables, pictures."""
