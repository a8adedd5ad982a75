"""Language models: from a name to a folder, from a folder to an opened model that reads and generates.

It knows no teacher and no student.
"""
