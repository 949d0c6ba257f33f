"""Tasks: what a model is trained for, and on which data."""
