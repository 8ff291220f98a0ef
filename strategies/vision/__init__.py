"""Pairs about pictures: their processor, raw rows, and the pictures of a forward.

A prepared row keeps its pictures as encoded files in `images`, beside ids in which each picture's placeholder tokens stand
already. Pixels are made where a forward is collated, in the data loader's workers, and a prompt's pictures are encoded once
for both of its completions.
"""
