"""DeepSpeed ZeRO checkpoints: managed while training, and turned into weights.

saving/, resuming/   saves and resumes of a training;  trainers/  the same in other trainers
engine/, state/      what is known of DeepSpeed's engine, and a rank's state as files
plain_torch/         a training without DeepSpeed, seen as an engine
torch_training/      a plain torch training as a distributed checkpoint, and back
distributed/         steps that all ranks take, or none
live/, weights/      weights of a running training, and of a checkpoint
inspection/          the numbers of a checkpoint, and how two differ
rewrite/             other ranks, another stage, the universal format, torch's DCP
runs/, folders/      the checkpoints of a run; folders that are there whole or not at all
shares/              one output made by several processes
hub/                 the Hugging Face Hub;  cli/  the command ``ckpt``
results, text, version, deprecation  values as JSON, sizes in messages, names of old
requirements         the oldest versions of other libraries
zero_to_fp32         drop-in replacements for DeepSpeed's functions
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ckpt.version import __version__

if TYPE_CHECKING:
    from ckpt import live as live
    from ckpt import trainers as trainers
    from ckpt import zero_to_fp32 as zero_to_fp32
    from ckpt.hub.background import Push as Push
    from ckpt.resuming.resume import resume as resume
    from ckpt.resuming.select import find as find
    from ckpt.rewrite import dcp as dcp
    from ckpt.rewrite import reshard as reshard
    from ckpt.rewrite import universal as universal
    from ckpt.runs.retention import Retention as Retention
    from ckpt.saving.preemption import Preemption as Preemption
    from ckpt.saving.saver import Saver as Saver
    from ckpt.weights.conversion import convert as convert
    from ckpt.weights.conversion.to_fp32 import to_fp32 as to_fp32
    from ckpt.weights.opening.opened import open as open
    from converters.errors import CheckpointError as CheckpointError

__all__ = [
    "CheckpointError",
    "Preemption",
    "Push",
    "Retention",
    "Saver",
    "__version__",
    "find",
    "open",
    "resume",
    "to_fp32",
]

_NAMES = {  # public names, by the module that each is loaded from when it is first used
    "CheckpointError": "converters.errors",
    "Preemption": "ckpt.saving.preemption",
    "Push": "ckpt.hub.background",
    "Retention": "ckpt.runs.retention",
    "Saver": "ckpt.saving.saver",
    "find": "ckpt.resuming.select",
    "open": "ckpt.weights.opening.opened",
    "resume": "ckpt.resuming.resume",
    "to_fp32": "ckpt.weights.conversion.to_fp32",
}
_MODULES = {  # public modules, under the names that users import them by
    "convert": "ckpt.weights.conversion.convert",
    "dcp": "ckpt.rewrite.dcp",
    "live": "ckpt.live",
    "reshard": "ckpt.rewrite.reshard",
    "trainers": "ckpt.trainers",
    "universal": "ckpt.rewrite.universal",
    "zero_to_fp32": "ckpt.zero_to_fp32",
}


if not TYPE_CHECKING:  # or else a type checker takes every name, and knows the type of none

    def __getattr__(name: str) -> Any:
        """Loads a public name when it is first used,
        so that ``ckpt --help`` stays instant."""
        if name in _NAMES:
            return getattr(_imported(_NAMES[name], name), name)
        if name in _MODULES:
            return _imported(_MODULES[name], name)
        raise AttributeError(f"module 'ckpt' has no attribute {name!r}")

    def _imported(module: str, name: str) -> Any:
        """The module of a public name;
        ``CheckpointError`` where it needs torch to be there."""
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            from ckpt import requirements

            if requirements.is_of_torch(error):
                raise requirements.without_torch(f"ckpt.{name}") from error
            raise


def __dir__() -> list[str]:
    """The public names, loaded or not, and what every module has."""
    of_every_module = {name for name in globals() if name.startswith("__")}
    return sorted({*of_every_module, *__all__, *_MODULES})
