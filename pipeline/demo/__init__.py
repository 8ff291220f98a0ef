"""The demo: a real model, a preference that a program can check, and a run that learns it."""
