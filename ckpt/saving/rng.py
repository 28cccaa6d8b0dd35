"""The random generators of this process: what ``capture`` found, ``restore`` sets again.

Those of python (``random``), numpy (the global, legacy one), torch on the CPU, and every device of
an accelerator that this process has started. The next numbers of each are the same then. As plain
values, for ``plain``.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from converters.errors import CheckpointError

NAME = "rng_state_{}.state"  # of a rank
DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Modules of torch with a generator for each device: its own ones, and those that vendors add.
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
    """Sets all generators as they were captured; one line for each that is not here any more.

    Where the number of devices has changed, only that of the device in use is set. Sets all or, if
    the state is damaged, none: ``CheckpointError``.
    """
    before = capture()
    try:
        return _set(state)
    except DAMAGE as error:
        _set(before)
        raise CheckpointError(
            f"the random state is damaged, or of another version ({error}); resume from another "
            "checkpoint"
        ) from error


def _set(state: dict[str, Any]) -> list[str]:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    absent = []
    for name, held in state["devices"].items():
        module, states = _accelerators().get(name), held["states"]
        if module is None:
            absent.append(f"the random states of {len(states)} {name} devices: there are none here")
        elif module.device_count() == len(states):
            for index, each in enumerate(states):
                module.set_rng_state(each, index)
        else:
            module.set_rng_state(states[held["current"]], module.current_device())
            absent += [
                f"the random state of {name} device {index}: {len(states)} devices were saved, "
                f"there are {module.device_count()} here"
                for index in range(len(states))
                if index != held["current"]
            ]
    return absent


def _accelerators() -> dict[str, Any]:
    """The modules of the accelerators that this process has started, by name; starts none."""
    found = {name: getattr(torch, name, None) for name in ACCELERATORS}
    started = {name: getattr(module, "is_initialized", None) for name, module in found.items()}
    return {name: found[name] for name, asked in started.items() if asked is not None and asked()}
