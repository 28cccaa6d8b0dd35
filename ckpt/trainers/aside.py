"""A front end's own save, written aside by all ranks and committed when all have succeeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ckpt.saving.commit import Commit, committed
from ckpt.saving.engine import Written, put_in


@contextmanager
def aside(commit: Commit, engines: Sequence[Any]) -> Iterator[Path]:
    """The folder for the front end to save into, on every rank; what ``engines`` save there is
    written, synced and digested by us.

    Committed if all blocks end without an error, else gone. ``CheckpointError`` on every rank.
    """
    with committed(commit) as folder:
        with ExitStack() as stack:
            writers = [stack.enter_context(put_in(engine, Written)) for engine in engines]
            try:
                yield folder
            finally:  # of a full disk, say, this is the first that failed, and tells more
                for writer in writers:
                    writer.require()
        for writer in writers:
            assert isinstance(writer, Written)
            for path, file in writer.files.items():
                commit.files[path.relative_to(folder).as_posix()] = file
        with commit.ranks.step():
            pass  # every rank has written all it will
        commit.settle()
