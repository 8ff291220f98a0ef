"""Findings about a run: `rules.py` is the table of rules, `facts.py` what they look at, `run.py` reads a run's folder."""
