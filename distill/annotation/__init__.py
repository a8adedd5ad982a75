"""What is asked of a teacher, each request once, and which rationales are worth learning from. It knows no training."""
