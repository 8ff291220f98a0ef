"""An adapter becomes part of its base model, which PEFT does with the whole model in memory.

base.py          the base model in float32, and the dtypes that its weights are stored in
policy.py        the adapter on it, and the model that is made of both
verification.py  whether the merged model computes what base and adapter compute
"""
