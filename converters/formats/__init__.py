"""Formats of weights:
each is read as ``Weights`` and written from ``Weights`` as a plan.

safetensors         model.safetensors, whole or in shards
pytorch_bin         pytorch_model.bin, whole or in shards
shard_index         the index of shards, and what lies in which
named_values        values of a torch file by name, those of dicts in dicts too
plain_values        those of them that are plain: numbers, texts and lists of these
wrapped_state_dict  a torch file with a state dict among other values, such as Lightning's
model_files         the names of all these files, and who reads them
weight_files        any of these as a ``Source``
gathered_16bit      the 16-bit weights that a trainer left beside the state files
"""
