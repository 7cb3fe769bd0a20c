"""Probes: linear-probe accuracy, similarity and loss of the blocks of trained models, by noise level."""
