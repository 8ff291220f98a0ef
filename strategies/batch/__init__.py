"""Batches of optimizer steps.

plan.py         assignment of pairs to steps, workers and forwards: pure functions of seed, epoch and step
loader.py       data loader of one worker's steps
pairs.py        padded and packed batches of pairs
kto_sampler.py  KTO's rows, with the completions that estimate its KL term
row_ledger.py   ids of the rows of each step
"""
