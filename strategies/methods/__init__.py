"""The strategies: one file each, shared code in `base.py`, their names in `registry.py`."""
