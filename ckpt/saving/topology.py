"""Whether a checkpoint loads on these ranks in this ZeRO stage, and what makes one that does.

Every front end asks here, so all say the same sentence and the same ``ckpt reshard`` command.
With ``reshard="auto"`` rank 0 does what the command does, beside the checkpoint and once, while the
other ranks wait and see that it is alive.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ckpt import rewriting
from ckpt.ranks import Ranks, alive
from ckpt.rewriting import Rewriting
from ckpt.runs.run import Checkpoint, Run, is_numbered, open_checkpoint
from ckpt.saving.layout import Layout
from ckpt.saving.source import Source
from converters import reshard
from converters.errors import CheckpointError
from converters.folder import is_tag_folder

Reshard = Literal["auto"] | None
BY_ARGUMENT = 'or pass reshard="auto"'  # where the function that is called has that argument


def require_known(mode: Any) -> None:
    """``CheckpointError`` unless it says what to do about another topology."""
    if mode not in (None, "auto"):
        raise CheckpointError(f"reshard={mode!r}, expected None or auto", "refused")


def difference(source: Source, layout: Layout) -> str:
    """What the checkpoint is, and what this training is."""
    there, here = source.topology, layout.topology
    return (
        f"{source.folder} is of {there.world_size} ranks with ZeRO stage {there.stage}, this "
        f"training has {here.world_size} with stage {here.stage}"
    )


def refusal(source: Source, layout: Layout, else_: str = "") -> CheckpointError:
    """Why the checkpoint does not load as it is, and the command that makes one that does.

    ``else_`` is another way, which the front end has.
    """
    there, here, what = source.topology, layout.topology, difference(source, layout)
    if not there.stage or not here.stage:
        return CheckpointError(
            f"{what}; only stages 1 to 3 can be resharded: set zero_optimization.stage to "
            f"{there.stage}, or begin anew from its weights (ckpt to-fp32 {source.folder})",
            "unsupported",
        )
    run = f"run: {_command(source, layout)}"
    return CheckpointError("; ".join([what, run, *filter(None, [else_])]), "unsupported")


def _command(source: Source, layout: Layout) -> str:
    """The command line that makes of the checkpoint what loads."""
    there, here = source.topology, layout.topology
    output = _output_of(source, layout)
    return (
        f"ckpt reshard {source.folder} --world-size {here.world_size} --stage {here.stage}"
        f"{_options(layout.options(there))} -o {output}"
    )


def _output_of(source: Source, layout: Layout) -> Path:
    """The folder beside the checkpoint that it is resharded to, as ``reshard`` names it."""
    there, here = source.topology, layout.topology
    stage = f"-z{here.stage}" if here.stage != there.stage else ""
    return source.folder.with_name(f"{source.folder.name}{stage}-w{here.world_size}")


def fitting(
    ranks: Ranks, source: Source, layout: Layout, mode: Reshard, else_: str = BY_ARGUMENT
) -> Source:
    """The source itself or, if it does not load as it is, what it is resharded to.

    Every rank calls it. ``CheckpointError`` if it has to be resharded and is not to be, or cannot.
    """
    if source.topology.loads_as(layout.topology):
        return source
    with ranks.step() as made:
        if not ranks.rank:
            if mode is None or not (source.topology.stage and layout.topology.stage):
                raise refusal(source, layout, else_)
            made.value = str(_resharded(ranks, source, layout))
    with ranks.step():
        return replace(
            Source.of(open_checkpoint(Path(made.heard[0])), Path(source.tag).name), resharded=True
        )


def loadable(
    ranks: Ranks, folder: Path, layout: Layout, mode: Reshard, else_: str = BY_ARGUMENT
) -> Path:
    """What to load in the place of a checkpoint that was asked for: it, or what it is resharded to.

    For front ends that load by themselves; every rank calls it. ``CheckpointError`` for one that
    has weights only, and as ``fitting`` raises. What nobody of ours wrote and nobody of ours can
    read is left to who loads it.
    """
    with ranks.step() as step:
        require_known(mode)
        if not ranks.rank:
            step.value = str(_loadable(ranks, folder, layout, mode, else_))
    return Path(step.heard[0])


def _loadable(ranks: Ranks, folder: Path, layout: Layout, mode: Reshard, else_: str) -> Path:
    found = open_checkpoint(folder)
    require_state(found)
    try:
        source = Source.of(found)
    except CheckpointError:
        if found.manifest is not None:
            raise
        return folder
    if source.topology.loads_as(layout.topology):
        return folder
    staged = bool(source.topology.stage and layout.topology.stage)
    if staged and mode is None and (output := _resharded_before(source, layout)) is not None:
        return output
    if mode is None or not staged:
        raise refusal(source, layout, else_)
    return _resharded(ranks, source, layout)


def _resharded_before(source: Source, layout: Layout) -> Path | None:
    """Where the source was resharded for this layout before, as the error advises."""
    output = _output_of(source, layout)
    if not output.is_dir() or not _is_made_of(source, _planned(source, layout)):
        return None
    print(
        f"ckpt: {difference(source, layout)}: going on from {output}", file=sys.stderr, flush=True
    )
    return output


def require_state(found: Checkpoint) -> None:
    """``CheckpointError`` for a checkpoint without state of DeepSpeed, with what can be done."""
    if found.tier == "full" or (found.manifest is None and _may_have_state(found.folder)):
        return
    newest = Run(found.folder.parent).newest() if is_numbered(found.folder) else None
    else_ = f"resume from {newest.folder}, the newest full one, or " if newest else ""
    what = "weights only; training cannot go on from it"
    if (found.folder / "optimizer.pt").exists():
        what = "was saved without DeepSpeed, whose state it lacks; DeepSpeed cannot go on from it"
    raise CheckpointError(
        f"{found.folder}: {what}: {else_}make the model of its weights (from_pretrained) and train "
        "without resuming",
        "incomplete",
    )


def _may_have_state(folder: Path) -> bool:
    """Whether a folder without a manifest has state of DeepSpeed, or nothing that is known."""
    weights = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
    return not any(any(folder.glob(form)) for form in weights) or any(
        is_tag_folder(inner) for inner in folder.iterdir() if inner.is_dir()
    )


def _resharded(ranks: Ranks, source: Source, layout: Layout) -> Path:
    """Where the source is for this layout, made if need be; on rank 0."""
    from ckpt import reshard as resharding

    with alive(ranks):
        planned = _planned(source, layout)
        if _is_made_of(source, planned):
            return planned.output
        what = difference(source, layout)
        print(f"ckpt: {what}: resharding to {planned.output}", file=sys.stderr, flush=True)
        overwrite = _may_be_replaced(source, planned)
        try:
            resharding.run(planned, overwrite=overwrite)
        except CheckpointError as error:
            if error.kind != "output":
                raise
            raise CheckpointError(
                f"{error} (an option of: {_command(source, layout)}), and resume from that by name",
                "output",
            ) from error
    for note in planned.notes:
        print(f"ckpt: {planned.output}: {note}", file=sys.stderr, flush=True)
    return planned.output


def _planned(source: Source, layout: Layout) -> Rewriting:
    """The resharding of the source for this layout, beside it."""
    from ckpt import reshard as resharding

    here = layout.topology
    options: dict[str, Any] = {"stage": here.stage, "tag": source.tag}
    options |= layout.options(source.topology)
    return resharding.prepare(source.folder, here.world_size, **options)


def _is_made_of(source: Source, planned: Rewriting) -> bool:
    """Whether the planned output is there, whole, and a resharding of this source for this."""
    if source.foreign or not planned.output.is_dir():
        return False
    made, held = open_checkpoint(planned.output), open_checkpoint(source.folder).manifest
    if made.why is not None or made.manifest is None or held is None or planned.target is None:
        return False
    return made.manifest.save == rewriting.save_of(held, planned.target)


def _may_be_replaced(source: Source, planned: Rewriting) -> bool:
    """Whether what has the output's name was resharded from this source before.

    One without a manifest says nothing of its bytes, so it is made anew: only if its files are laid
    out as ours are of this source. ``CheckpointError`` for anything else.
    """
    if not planned.output.exists():
        return False
    with suppress(CheckpointError):
        if source.foreign and planned.target is not None:
            checkpoint = planned.checkpoint
            reshard.prove(checkpoint, planned.target, planned.plan, planned.output)
            return True
    raise CheckpointError(
        f"{planned.output} exists, and is not {source.folder} resharded for this training; move it "
        "away, or resume from it by name",
        "output",
    )


def _options(settings: Mapping[str, Any]) -> str:
    """Those settings on the command line."""
    options = []
    if "sub_group_size" in settings:
        options.append(f" --sub-group-size {settings['sub_group_size']}")
    if "zero_init" in settings:
        options.append(f" --{'' if settings['zero_init'] else 'no-'}zero-init")
    return "".join(options)
