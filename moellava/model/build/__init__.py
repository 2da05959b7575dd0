"""A request for a new model → its parts → one model."""
