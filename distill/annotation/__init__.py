"""Annotation: requests to the teacher, each annotated once, and the filtering of its rationales. Knows no training."""
