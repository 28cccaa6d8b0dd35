"""How much host memory this process may take: of the machine, and of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from converters.errors import CheckpointError
from converters.plan import parse_size

SHARE = 0.5  # of the memory that is available, where no budget is given
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def budget(requested_budget: str | int | None) -> int:
    """A budget in bytes;
    without one, this rank's part of half the memory that is available."""
    if requested_budget is None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        node_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or world_size
        return int(SHARE * available() / node_ranks)

    try:
        return (
            parse_size(requested_budget)
            if isinstance(requested_budget, str)
            else max(0, requested_budget)
        )
    except ValueError as error:
        raise CheckpointError(f"memory: {error}", "output") from error


def available() -> int:
    """Bytes of memory that programs can still get; 0 if that is not known.

    As Linux estimates it (``/proc/meminfo``), or less where a container is allowed less.
    """
    for name, count in _counts(Path("/proc/meminfo")):
        if name == "MemAvailable:":
            return min([count * 1024, *allowed()])

    return 0


def allowed(
    groups_file: Path = Path("/proc/self/cgroup"),
    mount_point: Path = Path("/sys/fs/cgroup"),
) -> Iterator[int]:
    """The bytes that each control group of this process leaves it;
    page cache counts as free.

    Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    for line in _lines(groups_file):
        _, controllers, group_path = [*line.split(":", 2), "", "", ""][:3]
        if "memory" in controllers.split(","):
            hierarchy, file_names = mount_point / "memory", _V1
        elif not controllers:
            hierarchy, file_names = mount_point, _V2
        else:
            continue

        group_folder = hierarchy / group_path.lstrip("/")
        for folder in (group_folder, *group_folder.parents):
            if folder == hierarchy.parent:
                break

            limit_bytes, used_bytes = (_number(folder / name) for name in file_names[:2])
            if limit_bytes is None or used_bytes is None:
                continue  # above this container's own, or without a limit

            cached_bytes = dict(_counts(folder / "memory.stat")).get(file_names[2], 0)
            yield max(0, limit_bytes - used_bytes + cached_bytes)


def _number(path: Path) -> int | None:
    """The number that is all of a file; ``None`` where there is another text,
    or no file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _counts(path: Path) -> Iterator[tuple[str, int]]:
    """The names and numbers at the beginnings of a file's lines; nothing without a file."""
    for line in _lines(path):
        words = line.split()
        if len(words) > 1 and words[1].isdecimal():
            yield words[0], int(words[1])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
