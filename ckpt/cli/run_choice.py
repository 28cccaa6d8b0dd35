"""Which checkpoint a command reads that is given a path, a tag and perhaps ``--last``."""

from __future__ import annotations

from pathlib import Path

import click


def checkpoint_of(path: Path, tag: str | None, last: bool, command: str) -> Path:
    """The path of the checkpoint: ``path`` itself, or with ``last`` the newest of the run there.

    Says on stderr which that is. ``CheckpointError`` for a run without ``last`` that no file
    latest leads on from; ``command`` is how the user called it, such as "ckpt to-fp32".
    """
    from ckpt.cli import planned
    from ckpt.runs.states import newest
    from converters.errors import CheckpointError
    from converters.storage.store import is_url, local_path

    if not last:
        if tag is None and not is_url(path):
            newest.require_checkpoint(path, command, "--last")
        return path
    if tag is not None:
        raise CheckpointError(
            f"--tag {tag} does not go with --last, which chooses among the checkpoints of a run; "
            "leave one of them out",
            "refused",
        )

    with planned.announcements(as_json=False):
        choice = newest.newest_at(local_path(path), f"{command} --last")
    click.echo(f"ckpt: {choice.remark}", err=True)

    return choice.checkpoint.folder
