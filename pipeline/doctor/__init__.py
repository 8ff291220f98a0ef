"""What a person wants told before a run: whether recipe, cluster, storage and memory hold together."""
