"""The parts of a param group that model-parallel ranks have in common: its options, its
steps, its states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.torch_files import object_graph
from converters.torch_files.object_graph import Storage
from converters.zero.param_groups import ParamGroup


def require_same_count(
    paths: Sequence[Path], groups_by_rank: Sequence[Sequence[ParamGroup]]
) -> None:
    """Raises unless all ranks have as many param groups."""
    count = len(groups_by_rank[0])
    for path, groups in zip(paths, groups_by_rank, strict=True):
        if len(groups) != count:
            raise CheckpointError(
                f"{path} has {len(groups)} param groups, {paths[0].name} has {count}: which of "
                "them belong together is not known, so that they cannot be written as one",
                "unsupported",
            )


def require_same_settings(index: int, paths: Sequence[Path], groups: Sequence[ParamGroup]) -> None:
    """Raises unless the ranks have the same options
    and constants of param group ``index``."""
    first = groups[0]
    for path, group in zip(paths, groups, strict=True):
        are_alike = (
            _equal(group.options, first.options)
            and _equal(dict(group.constants), dict(first.constants))
            and group.keys == first.keys
        )
        if not are_alike:
            raise CheckpointError(
                f"{path} has other options or states of param group {index} than "
                f"{paths[0].name}; the files are of two saves, or the ranks were configured apart"
            )


def _equal(first: Any, second: Any) -> bool:
    """Whether two trees are alike;
    the numbers in their storages were compared on reading."""

    def is_alike(storage: Storage, counterpart: Storage) -> bool:
        return storage.kind == counterpart.kind and storage.numel == counterpart.numel

    return object_graph.equal(first, second, is_alike)
