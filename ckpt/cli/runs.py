"""The commands on runs: parse, call, print. Exit code 1: something is not whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.cli import planned
from ckpt.cli.latest import latest
from ckpt.cli.options import JSON, LOCAL_CHECKPOINT, RUN, best_of
from ckpt.cli.options import dry_run as dry_run_option
from ckpt.cli.planned import Output, Planned
from ckpt.cli.usage.command import Command
from ckpt.cli.verify import statuses_at, verify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt.runs.pruning import Outcome
    from ckpt.runs.retention import Best
    from ckpt.runs.states.status import CheckpointStatus


@click.command(cls=Command, short_help="List the checkpoints of a run.")
@RUN
@JSON
@planned.opening_once
def ls(run: Path, as_json: bool) -> None:
    """List the checkpoints of a run, the newest last.

    Step, name, tier, size, age, metrics, marks (latest, best, pinned, in use) and tag;
    of those that are not committed whether they are complete and who wrote them, or what
    is missing. Sizes are compared with the manifest; without one, headers are read. Says
    on stderr which job saves there right now.

    \b
    ckpt ls out
    ckpt ls out --json
    """
    from ckpt.cli import listing
    from ckpt.runs import user_paths
    from ckpt.runs.lease import watch
    from ckpt.runs.run import Run
    from ckpt.runs.states import listing as listings
    from ckpt.runs.states import trainings
    from ckpt.runs.states.status import statuses_of

    statuses = statuses_at(run)
    folder = statuses[0].checkpoint.folder.parent if statuses else run
    models = listings.models_beside(run, [status.checkpoint for status in statuses])
    rows = listings.ordered([*statuses, *statuses_of(models, wait=False)])
    if (writer := watch.describe(folder)) is not None:
        planned.say(f"{folder}: {writer}")

    result = listing.facts(Run(folder), rows)
    notices = [] if statuses else user_paths.absence(run, user_paths.EITHER)
    remarks = [*trainings.order_remarks(statuses, folder), *listings.closed_lines(run)]
    remarks += user_paths.torn_remarks(folder) if statuses else []
    notices += [f"ckpt: {line}" for line in remarks]
    planned.show(Output(result, listing.lines(result.checkpoints), notices), as_json)


@click.command(cls=Command, short_help="Delete checkpoints that no rule keeps.")
@RUN
@click.option("--keep-last", metavar="N", type=click.IntRange(1), help="Keep the N newest.")
@click.option(
    "--keep-every",
    metavar="N",
    type=click.IntRange(1),
    help="Keep every checkpoint whose step is a multiple of N.",
)
@click.option(
    "--keep-best",
    metavar="METRIC:MODE:N",
    callback=best_of,
    help="Keep the N best by a metric, such as eval_loss:min:2.",
)
@click.option(
    "--others",
    is_flag=True,
    help="Delete the checkpoints of other runs, and those that the run went back from.",
)
@click.option("--run", "run_id", metavar="ID", help="With --others: only those of this run.")
@dry_run_option("Say what would be deleted, and delete nothing.")
@JSON
def prune(
    run: Path,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: Best | None,
    others: bool,
    run_id: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete committed checkpoints that no rule keeps.

    The newest, the newest full one, the best, what latest or best names, what is pinned
    and what a conversion reads are always kept. What is not committed is not touched,
    and named on stderr. Where the folder has checkpoints of several runs, the rules count
    those of the run that saved last, and the others stay; --others deletes them, and what a
    training renamed because it saved under the name (checkpoint-6.foreign), committed or not.

    \b
    ckpt prune out --keep-last 3 --keep-every 1000 --keep-best eval_loss:min:2 --dry-run
    ckpt prune out --keep-last 3
    ckpt prune out --others --dry-run
    """
    from ckpt.runs import pruning
    from ckpt.runs.retention import Retention, require_metric
    from ckpt.runs.states import listing

    _require_rules(bool(keep_last or keep_every or keep_best), others, run_id)
    opened_run = listing.run_at(run, "ckpt prune")
    if others:
        outcomes = pruning.plan_others(opened_run, run_id)
    else:
        retention = Retention(keep_last, keep_every, keep_best)
        metric_names = [name for entry in opened_run.checkpoints() for name in entry.metrics]
        if retention.best is not None and retention.best[0] not in metric_names:
            _require_committed_metric(opened_run.path, retention.best[0])
        require_metric(retention, metric_names, opened_run.path)
        outcomes = pruning.plan(opened_run, retention)

    trash = pruning.trash(opened_run)
    alone = _left_alone(opened_run.path, outcomes, trash)
    committed_step = max((outcome.checkpoint.step or 0 for outcome in outcomes), default=0)
    if any(status.complete and (status.step or 0) > committed_step for status in alone):
        outcomes = pruning.amid_newer(outcomes)
    planned.run(
        Planned(
            preview=lambda: _pruned(opened_run.path, outcomes, alone, trash, dry_run=True),
            execute=lambda _: _pruned(
                opened_run.path, pruning.execute(opened_run, outcomes), alone, trash, dry_run=False
            ),
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


def _require_rules(has_rules: bool, others: bool, run_id: str | None) -> None:
    if others and has_rules:
        raise click.UsageError("--others and --keep-... are two steps; use one of them.")
    if run_id is not None and not others:
        raise click.UsageError("--run says which run --others deletes; add --others.")
    if not has_rules and not others:
        raise click.UsageError(
            "Say what to keep: --keep-last, --keep-every or --keep-best; or --others."
        )


def _left_alone(
    run: Path, outcomes: Sequence[Outcome], trash: Sequence[Path]
) -> list[CheckpointStatus]:
    """The checkpoints that no rule is about: those that are not committed,
    with their states."""
    from ckpt.runs.states import listing, status

    judged_folders = {*(outcome.checkpoint.folder for outcome in outcomes), *trash}
    uncommitted = [
        checkpoint
        for checkpoint in listing.checkpoints_in(run, keeps_unread=True)
        if not checkpoint.committed and checkpoint.folder not in judged_folders
    ]

    with planned.progress(len(uncommitted), run.name, "checkpoint") as advance:
        statuses = status.statuses_of(uncommitted, progress=advance, keeps_unread=True)

    return listing.ordered(listing.known(statuses, run))


def _pruned(
    run: Path,
    outcomes: Sequence[Outcome],
    alone: Sequence[CheckpointStatus],
    trash: Sequence[Path],
    dry_run: bool,
) -> Output:
    from ckpt.cli import listing
    from ckpt.cli.results.runs import PruneEntry, PruneResult
    from ckpt.runs.states import listing as listings
    from ckpt.text import size
    from converters.words import some

    entries = tuple(
        PruneEntry(outcome.checkpoint.folder, outcome.kept, outcome.reason, outcome.nbytes)
        for outcome in outcomes
    )
    freed_bytes = sum(entry.nbytes for entry in entries if not entry.kept)
    deletion = "would delete" if dry_run else "deleted"
    removal = f"{'would remove' if dry_run else 'removed'} the rest"
    names = [path.name for path in trash]

    return Output(
        PruneResult(dry_run, entries, listing.untouched(alone), freed_bytes),
        [
            f"{'kept' if entry.kept else deletion}\t{entry.path}\t{size(entry.nbytes)}"
            f"\t{entry.reason}"
            for entry in entries
        ],
        [
            *_alone_lines(run, bool(outcomes), alone),
            *(f"ckpt: {line}" for line in listings.closed_lines(run)),
            *([f"ckpt: {removal} of an interrupted deletion: {some(names)}"] if names else []),
            f"{size(freed_bytes)} {'would be freed' if dry_run else 'freed'}",
        ],
    )


def _require_committed_metric(run: Path, metric: str) -> None:
    """``CheckpointError`` where only checkpoints that are not committed have a metric, of
    which nothing is deleted."""
    from ckpt.runs.states import listing, status
    from converters.errors import CheckpointError
    from converters.words import shell_word, some

    statuses = status.statuses_of(listing.checkpoints_in(run), wait=False)
    names = [each.checkpoint.name for each in statuses if each.complete and metric in each.metrics]
    if names:
        raise CheckpointError(
            f"{run}: only checkpoints that are not committed have the metric {metric} "
            f"({some(names)}); ckpt doctor {shell_word(run)} --adopt commits them, and prune "
            "deletes committed ones only",
            "incomplete",
        )


def _alone_lines(run: Path, has_outcomes: bool, alone: Sequence[CheckpointStatus]) -> list[str]:
    """Lines on what was not touched, or on what lies there instead of checkpoints."""
    from ckpt.runs import user_paths
    from ckpt.runs.states import copies
    from ckpt.runs.states.status import CheckpointState
    from ckpt.runs.upkeep.uncommitted_findings import adoption_hint
    from converters.words import counted, shell_word, some, verb

    is_known = any(status.state is not CheckpointState.UNKNOWN for status in alone)
    if not is_known and not has_outcomes:
        return user_paths.absence(run, user_paths.RUN)

    copied = copies.originals([status.checkpoint for status in alone])
    saved = [status for status in alone if status.checkpoint.folder not in copied]
    hints = [*adoption_hint(saved, run), *copies.remarks(copied)]
    lines = [f"ckpt: not touched: {line}" for line in hints]
    incomplete = [status.checkpoint.name for status in saved if not status.complete]
    if incomplete:
        subject = counted(len(incomplete), "checkpoint")
        lines.append(
            f"ckpt: not touched: {subject} {verb(len(incomplete), 'is', 'are')} not complete "
            f"({some(incomplete)}); ckpt doctor {shell_word(run)} says why"
        )

    return lines


@click.command(cls=Command, short_help="Keep a checkpoint, whatever retention says.")
@LOCAL_CHECKPOINT
@dry_run_option("Say what would be marked, and mark nothing.")
@JSON
def pin(checkpoint: Path, dry_run: bool, as_json: bool) -> None:
    """Keep a checkpoint, whatever retention says.

    \b
    ckpt pin out/checkpoint-500
    """
    _pin(checkpoint, pinned=True, dry_run=dry_run, as_json=as_json)


@click.command(cls=Command, short_help="Let retention delete a checkpoint again.")
@LOCAL_CHECKPOINT
@dry_run_option("Say what would be unmarked, and unmark nothing.")
@JSON
def unpin(checkpoint: Path, dry_run: bool, as_json: bool) -> None:
    """Let retention delete a checkpoint again.

    \b
    ckpt unpin out/checkpoint-500
    """
    _pin(checkpoint, pinned=False, dry_run=dry_run, as_json=as_json)


def _pin(folder: Path, *, pinned: bool, dry_run: bool, as_json: bool) -> None:
    from ckpt.cli.results.runs import PinResult
    from ckpt.runs import pruning, user_paths

    verb = "pin" if pinned else "unpin"
    checkpoint = user_paths.checkpoint_at(folder, f"ckpt {verb}")

    def execute(_: object) -> Output:
        is_idle = checkpoint.pinned is pinned
        pruning.pin(checkpoint, pinned)
        word = f"{'already' if pinned else 'not'} pinned" if is_idle else f"{verb}ned"
        return Output(PinResult(False, folder, pinned), [f"{word}\t{folder}"])

    planned.run(
        Planned(
            preview=lambda: Output(PinResult(True, folder, pinned), [f"would {verb}\t{folder}"]),
            execute=execute,
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


COMMANDS = (ls, latest, verify, prune, pin, unpin)
