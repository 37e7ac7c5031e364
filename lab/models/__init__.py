"""Models: Linen modules that are their own configuration. Loss, sharding and precision are defined elsewhere."""
