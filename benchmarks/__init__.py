"""Figures that are measured and not asserted: `scripts/benchmark <name>` prints them and keeps <name>.json here."""
