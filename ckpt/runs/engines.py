"""Several engines of one training in one checkpoint, such as an actor and a critic.

    checkpoint-5/
      actor/latest  actor/global_step5/...      what ``engine.save_checkpoint`` writes for each; so
      critic/latest  critic/global_step5/...    each of these folders is one that DeepSpeed loads
      rng_state_R.state  manifest.json          of the whole

The manifest's ``tag`` is that of the first, "actor/global_step5"; its ``progress`` has "engines",
the progress and the ZeRO stage of each by name. There is no ``latest`` in the folder itself: it
could name only one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ckpt.runs.manifest import Manifest, is_inside, read
from converters.errors import CheckpointError

ENGINES = "engines"  # among the progress


def names(held: Manifest) -> tuple[str, ...]:
    """The names of the engines, the first one first; empty of a checkpoint of one engine."""
    found = held.progress.get(ENGINES)
    if not isinstance(found, Mapping):
        return ()
    return tuple(name for name in found if is_inside(name) and "/" not in name)


def tags(held: Manifest) -> dict[str, str]:
    """The tag of each engine relative to the checkpoint, by its name; of a single one under ""."""
    if held.tag is None:
        return {}
    several, last = names(held), held.tag.rpartition("/")[2]
    return {name: f"{name}/{last}" for name in several} or {"": held.tag}


def others(folder: Path) -> tuple[str, ...]:
    """The other engines of the checkpoint that ``folder`` is the part of one engine of."""
    try:
        found = names(read(folder.parent))
    except CheckpointError:
        return ()
    return tuple(name for name in found if name != folder.name) if folder.name in found else ()


def pointers(tag: str, several: Iterable[str]) -> dict[str, str]:
    """What each file ``latest`` in a checkpoint of this tag holds, by its name in the folder."""
    last = tag.rpartition("/")[2]
    return {f"{name}/latest": last for name in several} or {"latest": tag}
