"""Talking to a model: in a terminal, over HTTP."""
