"""The embedded default: a real model, a preference that a program can check, and a run that shows both."""
