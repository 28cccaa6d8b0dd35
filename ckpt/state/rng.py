"""The random generators of this process: what ``capture`` found, ``restore`` sets again.

Those of python (``random``), numpy (the global, legacy one), torch on the CPU, and
every device of an accelerator that this process has started. The next numbers of each
are the same then. As plain values, for ``plain``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from converters.accessors import entry
from converters.errors import CheckpointError, MalformedError

NAME = "rng_state_{}.state"  # of a rank
# Modules of torch with a generator for each device: its own, and those that vendors add.
ACCELERATORS = ("cuda", "xpu", "npu", "mlu", "musa", "hpu")


def capture() -> dict[str, Any]:
    """The states of all generators, as values of their own."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "devices": {
            name: {
                "current": module.current_device(),
                "states": [
                    module.get_rng_state(index).cpu() for index in range(module.device_count())
                ],
            }
            for name, module in _accelerators().items()
        },
    }


def restore(state: dict[str, Any]) -> list[str]:
    """Sets all generators as they were captured.

    Gives one line for each that is not here any more. Where the number of devices has
    changed, only that of the device in use is set. Sets all or, if the state is
    damaged, none: ``CheckpointError``.
    """
    previous = capture()
    try:
        return _set(state)
    except MalformedError as error:
        _set(previous)
        raise CheckpointError(
            f"the random state is damaged, or of another version ({error}); resume "
            "from another checkpoint"
        ) from error


def _set(state: dict[str, Any]) -> list[str]:
    _apply(random.setstate, entry(state, "python", object))
    _apply(np.random.set_state, entry(state, "numpy", object))
    _apply(torch.set_rng_state, entry(state, "torch", torch.Tensor))
    missing_notes = []

    for name, device_state in entry(state, "devices", dict).items():
        module, states = _accelerators().get(name), entry(device_state, "states", list)
        if module is None:
            missing_notes.append(
                f"the random states of {len(states)} {name} devices: there are none here"
            )
        elif module.device_count() == len(states):
            for index, generator_state in enumerate(states):
                _apply(module.set_rng_state, generator_state, index)
        else:
            current = entry(device_state, "current", int)
            if not 0 <= current < len(states):
                raise MalformedError(f"device {current} of {len(states)} has no state")
            _apply(module.set_rng_state, states[current], module.current_device())
            missing_notes += [
                f"the random state of {name} device {index}: {len(states)} devices "
                f"were saved, there are {module.device_count()} here"
                for index in range(len(states))
                if index != current
            ]

    return missing_notes


def _apply(setter: Callable[..., object], *arguments: object) -> None:
    """Sets a generator, which alone knows what its states may be."""
    try:
        setter(*arguments)
    except Exception as error:  # random, numpy, torch: each raises what it stumbles over
        raise MalformedError(str(error)) from error


def _accelerators() -> dict[str, Any]:
    """The modules of the accelerators that this process has started, by name.

    Starts none.
    """
    modules = {}
    for name in ACCELERATORS:
        module = getattr(torch, name, None)
        is_started = getattr(module, "is_initialized", None)
        if is_started is not None and is_started():
            modules[name] = module

    return modules
