"""Files: where a model lies (`sources`), how weights are read (`weights`) and files written (`writing`)."""
