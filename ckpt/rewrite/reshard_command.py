"""The ``ckpt reshard`` command that a message names, so that it works as it is typed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from ckpt.runs.checkpoint_folder import open_checkpoint
from converters.words import shell_word


def command(
    folder: Path, world_size: int, stage: int, output: Path, settings: Mapping[str, Any]
) -> str:
    """The command line for the checkpoint in ``folder``;
    ``settings`` as ``Layout`` has them.

    Where ``output`` is there already, made by ckpt of this checkpoint, the command makes
    it again; where something else has its name, it makes one beside that.
    """
    overwrite = ""
    if is_made_of(folder, output):
        overwrite = " --overwrite"
    elif output.exists():
        output = _free(output)

    return (
        f"ckpt reshard {shell_word(folder)} --world-size {world_size} --stage {stage}"
        f"{_options(settings)} -o {shell_word(output)}{overwrite}"
    )


def is_made_of(folder: Path, output: Path) -> bool:
    """Whether ckpt made what lies at ``output``
    of the checkpoint in ``folder``, whole or not.

    What an older ckpt made says no name, and counts as made of it.
    """
    source = open_checkpoint(output).source if output.is_dir() else None
    if source is None or not source.is_rewriting:
        return False
    return (source.parent or source).name in (None, folder.name)


def _free(output: Path) -> Path:
    """A name beside ``output`` that nothing has."""
    names = (f"{output.name}-{number}" for number in count(2))
    return next(path for path in map(output.with_name, names) if not path.exists())


def _options(settings: Mapping[str, Any]) -> str:
    """Settings of a layout as options of ``ckpt reshard``."""
    arguments = [f" --{name} {settings[name]}" for name in ("tp", "ep", "pp") if name in settings]
    if "sub_group_size" in settings:
        arguments.append(f" --sub-group-size {settings['sub_group_size']}")
    if "zero_init" in settings:
        arguments.append(f" --{'' if settings['zero_init'] else 'no-'}zero-init")
    return "".join(arguments)
