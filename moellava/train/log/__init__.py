"""What a run records: steps, router load, pictures, history."""
