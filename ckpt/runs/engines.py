"""Several engines of one training in one checkpoint, such as an actor and a critic.

    checkpoint-5/
      actor/latest  actor/global_step5/...      what ``engine.save_checkpoint`` writes for each; so
      critic/latest  critic/global_step5/...    each of these folders is one that DeepSpeed loads
      rng_state_R.state  manifest.json          of the whole

The manifest's ``tag`` is that of the first, "actor/global_step5"; its ``progress`` has
"engines", the progress and the ZeRO stage of each by name. There is no ``latest`` in
the folder itself: it could name only one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ckpt.runs.manifest import Manifest, is_inside, read
from converters.errors import CheckpointError

ENGINES = "engines"  # among the progress


def names(manifest: Manifest) -> tuple[str, ...]:
    """The names of the engines, the first one first;
    empty of a checkpoint of one engine."""
    engines_progress = manifest.progress.get(ENGINES)
    if not isinstance(engines_progress, Mapping):
        return ()
    return tuple(name for name in engines_progress if is_inside(name) and "/" not in name)


def tags(manifest: Manifest) -> dict[str, str]:
    """The tag of each engine relative to the checkpoint,
    by its name; of a single one under ""."""
    if manifest.tag is None:
        return {}
    engine_names, tag_name = names(manifest), manifest.tag.rpartition("/")[2]
    return {name: f"{name}/{tag_name}" for name in engine_names} or {"": manifest.tag}


def others(folder: Path) -> tuple[str, ...]:
    """The other engines of the checkpoint that ``folder`` is the part of one engine of."""
    try:
        engine_names = names(read(folder.parent))
    except CheckpointError:
        return ()

    return (
        tuple(engine for engine in engine_names if engine != folder.name)
        if folder.name in engine_names
        else ()
    )


def pointers(tag: str, engine_names: Iterable[str]) -> dict[str, str]:
    """The content of each file ``latest`` in a checkpoint of this tag,
    by its name in the folder."""
    tag_name = tag.rpartition("/")[2]
    return {f"{engine}/latest": tag_name for engine in engine_names} or {"latest": tag}
