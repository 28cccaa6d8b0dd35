"""The commands ``ckpt push`` and ``ckpt pull``: parse, call, print. Exit codes as in ``cli``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.terminal import DTYPE, JSON, MAX_SHARD_SIZE, best_of, facts_as_json, progress

if TYPE_CHECKING:
    from ckpt.hub.planning import Planned
    from ckpt.runs.retention import Best


def _give_memory_back() -> None:
    """Has glibc give every piece back to the system that is freed (mallopt, M_MMAP_THRESHOLD).

    The pieces that hf_xet is given are freed by its threads; 60 MiB stayed with the process.
    """
    import ctypes

    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(-3, 1 << 20)


@click.command()
@click.argument("path", metavar="CHECKPOINT|RUN", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option(
    "--best",
    metavar="METRIC:MODE",
    callback=best_of,
    help="Of a run the best committed checkpoint, such as eval_loss:min. Default: the newest.",
)
@DTYPE
@MAX_SHARD_SIZE
@click.option("--revision", metavar="BRANCH", help="Made where it is not there. Default: main.")
@click.option("--path-in-repo", metavar="FOLDER", help="A folder of the repository.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", help="The commit's. Default: checkpoint, type, step.")
@click.option(
    "--private/--public",
    default=True,
    show_default=True,
    help="Of a repository that is made now; one that is there keeps what it is.",
)
@click.option(
    "--include-training-state",
    is_flag=True,
    help="The whole checkpoint and its manifest, to resume elsewhere; private repositories only.",
)
@click.option(
    "--uncommitted",
    is_flag=True,
    help="Even without a manifest, with the conversion's own proof alone.",
)
@click.option(
    "--keep-last",
    metavar="K",
    type=click.IntRange(1),
    help="Of revisions (or folders) step-N keep this one and the K-1 before it; delete older ones.",
)
@click.option(
    "--transport",
    type=click.Choice(["auto", "xet", "lfs", "stage"]),
    default="auto",
    show_default=True,
    help="How shards are sent: streamed by Xet, by LFS, or through --stage-dir.",
)
@click.option(
    "--stage-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Write one shard at a time there, and send it by the client's public API.",
)
@click.option(
    "--blocks",
    metavar="N",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Blocks of 64 MB on their way by Xet at once; each takes that much memory.",
)
@click.option(
    "--verify-download", is_flag=True, help="Read the headers of the weights back and compare."
)
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
@JSON
def push(
    path: Path,
    repo: str,
    best: Best | None,
    include_training_state: bool,
    stage_dir: Path | None,
    verify_download: bool,
    keep_last: int | None,
    blocks: int,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub, in one commit.

    Weights are converted while they are sent, and never lie on disk. Only model files are sent
    (weights, config, tokenizer, code, card), from committed checkpoints only, into a private
    repository unless it is there already. An interrupted push goes on where it stopped.

    \b
    ckpt push out/checkpoint-500 org/name --dtype bf16
    ckpt push out org/name --best eval_loss:min --revision step-500 --keep-last 3
    ckpt push out/checkpoint-500 org/name --include-training-state
    """
    from ckpt.hub import planning, refusals
    from ckpt.hub import push as pushing
    from ckpt.hub.choosing import chosen

    _give_memory_back()
    refusals.require_client()
    refusals.quiet()
    checkpoint = chosen(path, best, include_training_state)
    planned = planning.plan_push(
        checkpoint,
        repo,
        training_state=include_training_state,
        stage_dir=stage_dir,
        keep_last=keep_last,
        **options,
    )
    for line in planned.warnings:
        click.echo(f"ckpt: {line}", err=True)
    if dry_run:
        facts = planned.facts()
        click.echo(facts_as_json(facts) if as_json else _lines(planned))
        return
    with progress(planned.contents.nbytes, repo) as moved:
        done = pushing.execute(
            planned,
            verify_download=verify_download,
            keep_last=keep_last,
            stage_dir=stage_dir,
            blocks=blocks,
            progress=moved,
        )
    for line in done.warnings[len(planned.warnings) :]:
        click.echo(f"ckpt: {line}", err=True)
    if as_json:
        click.echo(facts_as_json(done.facts()))
        return
    click.echo(done.landed.pull_request or done.landed.url)
    click.echo(f"ckpt: {done.summary()}", err=True)


def _lines(planned: Planned) -> str:
    """A dry run for a reader."""
    from ckpt.report import size

    seen = planned.seen
    lines = [f"send\t{planned.place}{item.name}\t{size(item.nbytes)}" for item in planned.items]
    lines += [f"delete\t{name}" for name in planned.deleted]
    lines += [f"left out\t{name}\t{why}" for name, why in planned.contents.left_out]
    what = f"would be made, {'private' if planned.private else 'public'}"
    return "\n".join(
        [
            *lines,
            f"repository   {seen.repo}, {'is there' if seen.head else what}",
            f"revision     {seen.branch}{', new' if seen.new else ''}",
            f"bytes        {size(planned.contents.nbytes)}",
            f"transport    {planned.way}",
        ]
    )


@click.command()
@click.argument("source", metavar="ORG/NAME[@REVISION]")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--path-in-repo", metavar="FOLDER", help="Only this folder of the repository.")
@JSON
def pull(source: str, folder: Path, path_in_repo: str | None, as_json: bool) -> None:
    """Fetch a repository from the Hugging Face Hub into a new folder, whole or not at all.

    Every file is compared with the digest that the Hub lists. A training state is verified by its
    manifest too, so that a training can go on from it.

    \b
    ckpt pull org/name model
    ckpt pull org/name@step-500 out/checkpoint-500
    """
    from ckpt.hub import pull as pulling
    from ckpt.hub import refusals

    refusals.require_client()
    refusals.quiet()
    repo, _, revision = source.partition("@")
    with progress(0, repo) as moved:
        done = pulling.pull(
            repo, folder, revision=revision or None, path_in_repo=path_in_repo, progress=moved
        )
    if as_json:
        click.echo(facts_as_json(done.facts()))
        return
    click.echo(done.folder)
    click.echo(f"ckpt: {done.summary()}", err=True)


COMMANDS = (push, pull)
