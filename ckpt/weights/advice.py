"""Remedies that several messages name, in one wording."""

WRITE_AS_STORED = (
    "write the names as they are with --names as-stored (no config.json is written then)"
)
TENSORS_AS_STORED = "--names as-stored writes the tensors under the names of the checkpoint"
EVERY_TENSOR = "--names as-stored writes every tensor"
ASK_TRANSFORMERS = "--check transformers asks the installed transformers, should this be wrong"
