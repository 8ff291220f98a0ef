"""Checkpoints of a run: what each rank keeps, as safetensors with checksums, readable at any number of workers.

A checkpoint folder holds, per rank, `state-RANK-of-SIZE.safetensors` (its pieces of weights and optimizer), its random
state, and `manifest-RANK-of-SIZE.json`, written last, with the size and sha256 of each of its files. A checkpoint is
complete when the manifests of all ranks are there. Nothing in it is a pickle that could execute anything.
"""
