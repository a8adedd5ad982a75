"""Run folders -> arms -> verdicts -> one page. Does not import torch."""
