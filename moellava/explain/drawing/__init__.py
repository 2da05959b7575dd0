"""Arrays → matplotlib figures; nothing here knows a model."""
