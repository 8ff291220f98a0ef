"""`python -m pipeline`: the same as `prefray`."""

from pipeline.cli import main

main()
