"""Files: where they lie (`sources`), how they are read (`weights`) and written (`writing`)."""
