"""How soft targets become bytes: one file for each codec."""
