"""Evaluation of a trained model: metrics of pairs, and answers beside those of its reference."""
