"""Export a run's student as a folder that runs elsewhere."""
