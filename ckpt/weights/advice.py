"""Remedies that several messages name, in one wording."""

from __future__ import annotations

from converters.options import CHECK, NAMES


def write_as_stored() -> str:
    """The option that writes the weights whose names fit no reader."""
    return f"write the names as they are with {NAMES('as-stored')} (no config.json is written then)"


def tensors_as_stored() -> str:
    """The option that writes the tensors of an adapter
    that is not written as PEFT has it."""
    return f"{NAMES('as-stored')} writes the tensors under the names of the checkpoint"


def every_tensor() -> str:
    """The option that writes the tensors that the output lacks."""
    return f"{NAMES('as-stored')} writes every tensor"


def ask_transformers() -> str:
    """The option that decides whether a verdict on names is right."""
    return f"{CHECK('transformers')} asks the installed transformers, should this be wrong"
