"""A run's adapter becomes part of its base model: found, merged by `strategies.merging`, verified, and put in place.

source.py   what is merged: a run, or an adapter's folder, and the base model that belongs to it
samples.py  the tokens that a merged model is verified on
output.py   where it goes: a folder that appears when it is whole, or a URI
files.py    what stands beside the weights: config, tokenizer, model card
merge.py    the command as a whole
"""
