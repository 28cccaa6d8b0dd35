"""Whether a checkpoint loads on these ranks in this ZeRO stage,
and what makes one that does.

Every front end asks here, so all say the same sentence and the same ``ckpt reshard``
command. With ``reshard="auto"`` rank 0 does what the command does, beside the
checkpoint and once, while the other ranks wait and see that it is alive.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ckpt.distributed.ranks import RankGroup, alive
from ckpt.engine.layout import Layout
from ckpt.resuming.resume_point import ResumePoint, require_state
from ckpt.rewrite import job, records, reshard_command
from ckpt.rewrite.job import SAME_IN_ENGINE, Rewriting
from ckpt.runs.run import open_checkpoint
from ckpt.runs.states.status import status_of
from converters import options
from converters.errors import CheckpointError
from converters.options import OUTPUT, TP_RULES
from converters.words import shell_word
from converters.zero.parallel import engine_cuts
from converters.zero.parallel.cut_table import UnknownCutsError

log = logging.getLogger("ckpt")

Reshard = Literal["auto"] | None
# where the function that is called has that argument
BY_ARGUMENT = 'or pass reshard="auto"'


def require_known(mode: Any) -> None:
    """``CheckpointError`` unless it says what to do about another topology."""
    if mode not in (None, "auto"):
        raise CheckpointError(f"reshard={mode!r}, expected None or auto", "refused")


def difference(source: ResumePoint, layout: Layout) -> str:
    """The topology of the checkpoint and that of this training, in words."""
    saved, current = source.topology, layout.topology
    return (
        f"{source.folder} is of {saved}, this training has "
        f"{current.world_size}{current.degrees} with stage {current.stage}"
    )


def refusal(source: ResumePoint, layout: Layout, alternative: str = "") -> CheckpointError:
    """Why the checkpoint does not load as it is,
    and the command that makes one that does.

    ``alternative`` is another way, which the front end has.
    """
    finding = difference(source, layout)
    if (advice := _advice_on_degrees(source, layout)) is not None:
        return CheckpointError(f"{finding}; {advice}", "unsupported")

    run = f"run: {_command(source, layout)}"
    if _needs_rules(source, layout):
        with options.using(options.of_commands, overrides=True):
            rules = TP_RULES("FILE")
        return CheckpointError(
            f"{finding}; nothing in it says how parameters are cut for tensor parallelism; {run} "
            f"{rules} (without that it prints what to write into the file), and resume from that "
            "by name",
            "unsupported",
        )
    if (obstacle := _obstacle_without_zero(source, layout)) is not None:
        return CheckpointError(f"{finding}; {obstacle}", "unsupported")
    if (output := _foreign_output(source, layout)) is not None:
        run = f"{output} was resharded from it: resume from that by name, or {run}"
    sentence = "; ".join(filter(None, [finding, run, alternative]))
    return CheckpointError(sentence, "unsupported")


def _advice_on_degrees(source: ResumePoint, layout: Layout) -> str | None:
    """What to do where no command makes native files
    for such an engine; ``None`` elsewhere."""
    saved, current = source.topology.degrees, layout.topology.degrees
    is_without_tp = saved.tensor_ranks == current.tensor_ranks == 1
    is_cut = bool(saved.expert_ranks) and not is_without_tp
    is_written = layout.pipeline is not None and not is_cut and source.is_pipeline
    if current.stages > 1 and not is_written:
        if saved.expert_ranks:  # whose universal folder DeepSpeed does not load
            return "its experts are not written for such stages; resume with its own degrees"
        if not layout.topology.stage:  # nor does it load a universal folder without ZeRO
            return "such stages are written of pipelines alone; resume with its own degrees"
        return (
            "native files of several pipeline stages are written of pipelines alone: load a "
            f"universal folder (ckpt to-universal {source.folder}), which DeepSpeed cuts itself, "
            "with checkpoint.load_universal in its configuration and engine.load_checkpoint"
        )
    if len(current.expert_ranks or ()) > 1:
        return (
            "experts are resharded to one number of ranks for all layers; give the layers of this "
            "training the same ep_size"
        )
    return None


def _needs_rules(source: ResumePoint, layout: Layout) -> bool:
    """Whether a user has to say how parameters are cut for tensor parallelism: the saved
    ones, or those of this training; reads pickles where there are saved ones."""
    saved, current = source.topology.degrees, layout.topology.degrees
    if saved.tensor_ranks == 1:
        return current.tensor_ranks > 1 and not (layout.cuts or {}).get("affine_map")

    from converters.zero.merging import reader as merging  # which few need

    try:
        merging.read(source.folder, source.tag)
    except UnknownCutsError:
        return True
    except CheckpointError:
        return False  # which resharding says
    return False


def _obstacle_without_zero(source: ResumePoint, layout: Layout) -> str | None:
    """Why native files cannot be made, and what to do, where the checkpoint or this
    training is without ZeRO; ``None`` where they can, and elsewhere."""
    saved, current = source.topology.stage, layout.topology.stage
    if saved and current:
        return None

    try:
        with options.using(options.of_commands, overrides=True):
            _plan_rewriting(source, layout)
    except CheckpointError as error:
        way = "resume with its own degrees"
        if saved != current:
            way = f"set zero_optimization.stage to {saved}"
        return (
            f"{way}, or begin a new training from its weights (ckpt to-fp32 "
            f"{shell_word(source.folder)}); ckpt reshard does not help: {error}"
        )
    return None


def _command(source: ResumePoint, layout: Layout) -> str:
    """The command line that makes of the checkpoint what loads."""
    current = layout.topology
    settings = layout.options(source.topology, is_pipeline=source.is_pipeline)
    output = _output_of(source, layout)
    return reshard_command.command(
        source.folder, current.world_size, current.stage, output, settings
    )


def _foreign_output(source: ResumePoint, layout: Layout) -> Path | None:
    """Where one without a manifest was resharded for this layout before,
    if that is complete.

    Nothing says what its bytes were, so that it is taken by name alone.
    """
    output = _output_of(source, layout)
    if not source.foreign or not reshard_command.is_made_of(source.folder, output):
        return None
    resharded = open_checkpoint(output)
    is_fitting = resharded.record is not None and layout.topology.fits(resharded.record)
    return output if is_fitting and status_of(resharded).whole else None


def _output_of(source: ResumePoint, layout: Layout) -> Path:
    """The folder beside the checkpoint that it is resharded to, as ``reshard`` names it."""
    saved, current = source.topology, layout.topology
    stage = f"-z{current.stage}" if current.stage != saved.stage else ""
    settings = layout.options(saved, is_pipeline=source.is_pipeline)
    degree = f"-pp{current.degrees.stages}" if "pp" in settings else ""
    degree += f"-tp{settings['tp']}" if "tp" in settings else ""
    if "ep" in settings and saved.degrees.expert_ranks != (settings["ep"],):
        degree += f"-ep{settings['ep']}"
    return source.folder.with_name(f"{source.folder.name}{stage}{degree}-w{current.world_size}")


def fitting(
    ranks: RankGroup,
    source: ResumePoint,
    layout: Layout,
    mode: Reshard,
    alternative: str = BY_ARGUMENT,
) -> ResumePoint:
    """The source itself or, if it does not load as it is, what it is resharded to.

    Every rank calls it. ``CheckpointError`` if it has to be resharded and is not to be,
    or cannot.
    """
    if source.topology.loads_as(layout.topology):
        return source

    with ranks.step() as outcome:
        if not ranks.rank:
            if mode is None or not _can_be_resharded(source, layout):
                raise refusal(source, layout, alternative)
            outcome.value = str(_reshard_source(ranks, source, layout))

    with ranks.step():
        output = open_checkpoint(Path(outcome.heard[0]))
        return replace(ResumePoint.of(output, Path(source.tag).name), resharded=True)


def _can_be_resharded(source: ResumePoint, layout: Layout) -> bool:
    """Whether native files are written for this training without a word of the user's."""
    return (
        _advice_on_degrees(source, layout) is None
        and not _needs_rules(source, layout)
        and _obstacle_without_zero(source, layout) is None
    )


def loadable(
    ranks: RankGroup,
    folder: Path,
    layout: Layout,
    mode: Reshard,
    alternative: str = BY_ARGUMENT,
) -> Path:
    """The checkpoint to load in the place of one that was asked for: it,
    or what it is resharded to.

    For front ends that load by themselves; every rank calls it. ``CheckpointError`` for
    one that has weights only, and as ``fitting`` raises. What nobody of ours wrote and
    nobody of ours can read is left to who loads it.
    """
    with ranks.step() as outcome:
        require_known(mode)
        if not ranks.rank:
            outcome.value = str(_loadable(ranks, folder, layout, mode, alternative))
    return Path(outcome.heard[0])


def _loadable(
    ranks: RankGroup,
    folder: Path,
    layout: Layout,
    mode: Reshard,
    alternative: str,
) -> Path:
    checkpoint = open_checkpoint(folder)
    require_state(checkpoint)

    try:
        source = ResumePoint.of(checkpoint)
    except CheckpointError:
        if checkpoint.manifest is not None:
            raise
        return folder

    source.require_loadable(layout.topology)
    if source.topology.loads_as(layout.topology):
        return folder

    can_be_resharded = _can_be_resharded(source, layout)
    if can_be_resharded and mode is None:
        output = _earlier_output(source, layout)
        if output is not None:
            return output

    if mode is None or not can_be_resharded:
        raise refusal(source, layout, alternative)

    return _reshard_source(ranks, source, layout)


def _earlier_output(source: ResumePoint, layout: Layout) -> Path | None:
    """Where the source was resharded for this layout before, as the error advises."""
    output = _output_of(source, layout)
    if not output.is_dir() or not _is_made_of(source, _plan_rewriting(source, layout)):
        return None
    log.info("%s: going on from %s", difference(source, layout), output)
    return output


def _reshard_source(ranks: RankGroup, source: ResumePoint, layout: Layout) -> Path:
    """Where the source is for this layout, made if need be; on rank 0."""
    from ckpt.rewrite import reshard as resharding

    with alive(ranks):
        with _naming_command(source, layout):
            rewriting = _plan_rewriting(source, layout)
        if _is_made_of(source, rewriting):
            return rewriting.output

        finding = difference(source, layout)
        log.info("%s: resharding to %s", finding, rewriting.output)
        overwrite = _may_be_replaced(source, rewriting)
        with _naming_command(source, layout):
            resharding.execute(rewriting, overwrite=overwrite)

    for note in rewriting.notes:
        if not note.endswith(SAME_IN_ENGINE):  # it was made for this engine
            log.warning("%s: %s", rewriting.output, note)
    return rewriting.output


@contextmanager
def _naming_command(source: ResumePoint, layout: Layout) -> Iterator[None]:
    """Errors of this block that name options name the command, too: a resume has none."""
    try:
        with options.using(options.of_commands, overrides=True):
            yield
    except CheckpointError as error:
        if not any(flag in str(error) for flag in (" --", f" {OUTPUT.flag}")):
            raise
        raise CheckpointError(
            f"{error} (an option of: {_command(source, layout)}), and resume from that by name",
            error.kind,
        ) from error


def _plan_rewriting(source: ResumePoint, layout: Layout) -> Rewriting:
    """The resharding of the source for this layout, beside it."""
    from ckpt.rewrite import reshard as resharding

    current = layout.topology
    settings: dict[str, Any] = {"stage": current.stage, "tag": source.tag}
    settings |= layout.options(source.topology, is_pipeline=source.is_pipeline)
    with (
        options.using(options.of_functions({})),  # a resume has none of these arguments
        engine_cuts.using(layout.cuts),
    ):
        return resharding.plan(source.folder, current.world_size, **settings)


def _is_made_of(source: ResumePoint, rewriting: Rewriting) -> bool:
    """Whether the planned output is there, whole,
    and a resharding of this source for this."""
    return _is_of(source, rewriting) and open_checkpoint(rewriting.output).why is None


def _is_of(source: ResumePoint, rewriting: Rewriting) -> bool:
    """Whether the manifest of the planned output says so, whole or not."""
    if source.foreign or not rewriting.output.is_dir():
        return False
    resharded = open_checkpoint(rewriting.output)
    source_manifest = open_checkpoint(source.folder).manifest
    if resharded.manifest is None or source_manifest is None or rewriting.target is None:
        return False
    return resharded.manifest.save == records.save_of(source_manifest, rewriting.target)


def _may_be_replaced(source: ResumePoint, rewriting: Rewriting) -> bool:
    """Whether what has the output's name was resharded from this source before.

    That is one that is damaged, by its manifest. One without a manifest says nothing of
    its bytes, so it is made again: only if its files are laid out as ours are of this
    source. ``CheckpointError`` for anything else.
    """
    if not rewriting.output.exists():
        return False
    if _is_of(source, rewriting):
        return True

    with suppress(CheckpointError):
        if source.foreign and rewriting.target is not None:
            job.prove(rewriting, rewriting.output)
            return True

    raise CheckpointError(
        f"{rewriting.output} exists, and is not {source.folder} resharded for this "
        "training; move it away, or resume from it by name",
        "output",
    )
