"""Files: where they lie, how they are read and written, and what is said if they cannot be."""
