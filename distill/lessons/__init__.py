"""What a student learns from: the cache joined with the examples, in an order, as batches.

It does not know which loss reads what.
"""
