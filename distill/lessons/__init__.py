"""Lessons: the cache joined with the examples, ordered and collated into batches.

This package does not know which loss reads what.
"""
