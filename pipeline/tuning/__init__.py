"""Sweeps: Ray Tune over training, on data that are prepared and scored once."""
