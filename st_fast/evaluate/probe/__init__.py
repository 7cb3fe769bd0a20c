"""Probes: what the blocks of trained models know, by noise level, and the figures that show it."""
