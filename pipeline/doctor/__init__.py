"""Checks before a run: recipe, cluster, storage, memory."""
