"""Supervision methods: losses on the student's hidden states, besides the denoising loss."""

from st_fast.train.supervision.protocol import NoisyBatch, Parts, Rows, Supervision, create, select_rows

__all__ = ["NoisyBatch", "Parts", "Rows", "Supervision", "create", "select_rows"]
