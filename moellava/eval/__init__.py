"""Evaluation: answers beside the truth, and what they score."""
