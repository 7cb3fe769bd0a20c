"""Mutation testing of the core: `python -m tests.mutants`, or `make mutants`.

Small errors are put into the files of `FILES` (`files.py`) one at a time (`changes.py`), and the tests named there that
run the changed line must notice each (`trial.py`). What none notices is a survivor: a test is missing, or the change
makes no difference and stands in `equivalent.toml` with the reason.
"""
