"""Commands as jobs on a cluster: what goes there, and how it is asked for."""
