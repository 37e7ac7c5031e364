"""Models: Linen modules that are their own configuration. They know neither loss nor sharding nor precision."""
