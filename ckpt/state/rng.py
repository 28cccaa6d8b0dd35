"""The random generators of this process: what ``capture`` found, ``restore`` sets again.

Those of python (``random``), numpy (the global, legacy one), torch on the CPU, and
every device of an accelerator that this process has started. The next numbers of each
are the same then. As plain values, for ``plain``.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from converters.errors import CheckpointError

NAME = "rng_state_{}.state"  # of a rank
DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
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
    except DAMAGE as error:
        _set(previous)
        raise CheckpointError(
            f"the random state is damaged, or of another version ({error}); resume "
            "from another checkpoint"
        ) from error


def _set(state: dict[str, Any]) -> list[str]:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    missing_notes = []

    for name, device_state in state["devices"].items():
        module, states = _accelerators().get(name), device_state["states"]
        if module is None:
            missing_notes.append(
                f"the random states of {len(states)} {name} devices: there are none here"
            )
        elif module.device_count() == len(states):
            for index, generator_state in enumerate(states):
                module.set_rng_state(generator_state, index)
        else:
            current = device_state["current"]
            module.set_rng_state(states[current], module.current_device())
            missing_notes += [
                f"the random state of {name} device {index}: {len(states)} devices "
                f"were saved, there are {module.device_count()} here"
                for index in range(len(states))
                if index != current
            ]

    return missing_notes


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
