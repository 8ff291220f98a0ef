"""Experiment trackers. The driver reports each record once; workers have no trackers.

tracker.py      `Tracker`, the base class of trackers, and `TrialInfo`, a trial's place in its sweep
dispatcher.py   calls the trackers of a run, one thread each
NAME.py         everything about the tracker of the key `use_NAME`, as `TRACKER`; its package is imported inside functions
"""
