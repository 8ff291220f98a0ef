"""Checkpoint format: the state of each rank as safetensors with checksums, readable by any number of workers.

A checkpoint folder holds, per rank, `state-RANK-of-SIZE.safetensors` (its shards of weights and optimizer), its random state,
the rest of a generation batch of grpo, and `manifest-RANK-of-SIZE.json`, written last, with the size and sha256 of each of its
files. A checkpoint is complete when it has the manifests of all ranks. It contains no pickle that could execute code.
"""
