"""st_fast: a fast, honest trainer for self-transcending diffusion transformers."""

__version__ = "0.1.0"
