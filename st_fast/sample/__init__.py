"""Sampling: solvers, guidance, previews, and sets of samples that any number of ranks draw together."""
