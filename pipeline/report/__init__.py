"""Pages that show what a run or a sweep has found: one file each, without a network."""
