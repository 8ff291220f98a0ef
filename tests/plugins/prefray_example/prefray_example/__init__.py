"""Registers all four when it is imported."""

from prefray_example import callback, dataset, loss, strategy

__all__ = ["callback", "dataset", "loss", "strategy"]
