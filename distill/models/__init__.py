"""Language models: resolving names to folders, loading, reading and generating.

Nothing here depends on teachers or students.
"""
