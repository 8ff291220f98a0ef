"""An adapter becomes part of its base model, tensor by tensor.

weights.py       the base's tensors, read one at a time from safetensors, or from a model that had to be loaded whole
names.py         what parameters are called in files, and which of them are stored in several tensors
adapter.py       the adapter on a model without weights: which parameters it changes, and PEFT's own sum for each
plan.py          which tensors the merged model has, and what each of them is
writing.py       shards of bounded size, each written before the next is begun
verification.py  whether the merged model says what base and adapter say
"""
