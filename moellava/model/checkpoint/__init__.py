"""Saved models: opened, written as a difference, compared."""
