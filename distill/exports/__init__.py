"""A run's student as a folder that others can run."""
