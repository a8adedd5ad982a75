"""Annotation: what the teacher is asked, each request once, and which rationales are kept. It knows no training."""
