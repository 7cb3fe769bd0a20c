"""Supervision methods: what teaches the student's hidden states, besides the denoising loss."""

from st_fast.train.supervision.protocol import NoisyBatch, Rows, Supervision, select_rows
from st_fast.train.supervision.registry import create

__all__ = ["NoisyBatch", "Rows", "Supervision", "create", "select_rows"]
