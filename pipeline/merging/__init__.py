"""A run's adapter becomes part of its base model: found, merged by `strategies.merging`, verified, and put in place.

source.py   what is merged: a run, or an adapter's folder, its base model, and the tokens to verify it on
output.py   where it goes: a folder that appears when it is whole, or a URI
result.py   what was made: printed, and as the model's card
merge.py    the command as a whole
"""
