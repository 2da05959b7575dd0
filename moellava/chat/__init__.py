"""Talking to a model: in a terminal, in the browser, over HTTP."""
