"""st_fast: a fast, honest trainer for self-transcending diffusion transformers."""

from st_fast.core.machine import choose_threads

__version__ = "0.1.0"

choose_threads()  # before anything imports torch, which reads it when it loads
