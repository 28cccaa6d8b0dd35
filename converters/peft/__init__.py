"""PEFT's adapters: which tensors of a model they are,
and under which names PEFT saves them.

config           adapter_config.json, typed and bounded
patterns         its regular expressions, matched in bounded time
names            a parameter's name, taken apart: module, role, adapter
saved_names      names of the training of what was saved under PEFT's
kinds            the kinds of adapters, by the names of their parameters
export           the tensors that PEFT saves, under its names;  embeddings  those saved whole
config_fit       what tensors tell of an adapter, and whether a configuration is theirs
expected_layers  the layers that PEFT would make by a configuration;  targets  those without tensors
adapter_weights  the same as Weights;  columns  some columns of a matrix
prompts          prompts that are computed when they are saved: p-tuning and prefix tuning
merge/           the model with adapters merged in

Source of every rule: PEFT 0.21.2, ``utils/save_and_load.py`` and ``tuners/*/model.py``.
"""
