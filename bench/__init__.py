"""Measurements of st_fast: `pytest bench/` makes the figures, `python -m bench.report` prints them."""
