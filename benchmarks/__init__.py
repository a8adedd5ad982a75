"""Measurements without assertions: `scripts/benchmark <name>` prints the figures and writes <name>.json here."""
