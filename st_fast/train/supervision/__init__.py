"""Supervision methods: what teaches the student's hidden states, besides the denoising loss."""

from st_fast.train.supervision.protocol import Noised, Rows, Supervision, select_rows
from st_fast.train.supervision.registry import create

__all__ = ["Noised", "Rows", "Supervision", "create", "select_rows"]
