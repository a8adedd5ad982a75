"""Run folders -> arms -> verdicts -> one page. It needs no torch."""
