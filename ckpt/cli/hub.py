"""The commands ``ckpt push`` and ``ckpt pull``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli import planned
from ckpt.cli.options import DTYPE, JSON, LOCAL_PATH, MAX_SHARD_SIZE, OUTPUT_PATH, best_of
from ckpt.cli.options import dry_run as dry_run_option
from ckpt.cli.planned import Output, Planned
from ckpt.cli.usage.command import Command
from ckpt.cli.weight_options import request as weights_request
from ckpt.cli.weight_options import weights_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt.cli.results.hub import PullResult, PushPreview
    from ckpt.hub.plan import PushPlan
    from ckpt.hub.pull import Pulled, PullPlan
    from ckpt.hub.push import Pushed
    from ckpt.runs.retention import Best


def _give_memory_back() -> None:
    """Has glibc give every freed piece back to the system (mallopt, M_MMAP_THRESHOLD).

    The pieces that hf_xet is given are freed by its threads; 60 MiB stayed with
    the process.
    """
    from converters.storage.system import c_library

    if (mallopt := c_library.function("mallopt")) is not None:
        mallopt(-3, 1 << 20)


@click.command(cls=Command, short_help="Publish a checkpoint or a model on the Hugging Face Hub.")
@click.argument("path", metavar="CHECKPOINT|RUN|MODEL", type=LOCAL_PATH)
@click.argument("repo", metavar="ORG/NAME")
@click.option(
    "--best",
    metavar="METRIC:MODE",
    callback=best_of,
    help="Of a run push the best committed checkpoint, such as eval_loss:min. Default: the newest "
    "one that is committed or complete.",
)
@DTYPE
@MAX_SHARD_SIZE
@click.option("--revision", metavar="BRANCH", help="Created if it is missing. Default: main.")
@click.option("--path-in-repo", metavar="FOLDER", help="A folder of the repository.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", help="Message of the commit. Default: checkpoint, type, step.")
@click.option(
    "--private/--public",
    default=True,
    show_default=True,
    help="Visibility of a new repository; an existing one keeps its own.",
)
@click.option(
    "--include-training-state",
    "training_state",
    is_flag=True,
    help="Send the whole checkpoint and its manifest, to resume elsewhere; into private "
    "repositories only.",
)
@click.option(
    "--uncommitted",
    is_flag=True,
    help="Push a checkpoint that is not complete, too, if its weights are whole.",
)
@click.option(
    "--keep-last",
    metavar="K",
    type=click.IntRange(1),
    help="Keep K revisions (or folders) step-N, this one and those before it; delete older ones.",
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
    type=LOCAL_PATH,
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
    "--verify-download",
    is_flag=True,
    help="Read the headers of the weights back and compare.",
)
@dry_run_option("Say what would be sent, and send nothing.")
@weights_options
@JSON
def push(
    path: Path,
    repo: str,
    best: Best | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Publish a checkpoint or a model folder on the Hugging Face Hub, in one commit.

    Weights of a training are converted while they are sent, and never lie on disk.
    MODEL, a folder with weights alone (as to-fp32 writes it), is sent as it is. Only
    model files are sent (weights, config, tokenizer, code, card), and only of what is
    committed or complete. A new repository is private; an existing one keeps its
    visibility. An interrupted push continues where it stopped.

    \b
    ckpt push out/checkpoint-500 org/name --dtype bf16
    ckpt push out/checkpoint-500-fp32 org/name
    ckpt push out org/name --best eval_loss:min --revision step-500 --keep-last 3
    ckpt push out/checkpoint-500 org/name --include-training-state
    """
    from ckpt.hub import plan as planning
    from ckpt.hub import push as pushing
    from ckpt.hub.client import errors
    from ckpt.hub.select import chosen

    _give_memory_back()
    errors.require_client()
    errors.quiet()
    options["dtype"] = _named_dtype(options["dtype"])
    request = weights_request(options)
    push_options = planning.PushOptions(request=request, **options)
    with planned.announcements(as_json):
        choice = chosen(path, best, push_options.training_state)
    push_plan = planning.plan(choice.checkpoint, repo, push_options)
    remarks = [] if choice.remark is None else [choice.remark]
    early_remarks, notices = ([], remarks) if choice.committed else (remarks, [])
    for line in (*early_remarks, *push_plan.warnings):
        planned.say(line)

    planned.run(
        Planned(
            preview=lambda: Output(
                _push_preview(push_plan),
                _preview_lines(push_plan),
                [f"ckpt: {line}" for line in notices],
            ),
            execute=lambda progress: _pushed(pushing.execute(push_plan, progress), notices),
            nbytes=push_plan.contents.nbytes,
            title=repo,
            interruption=lambda: "the same command sends what the Hub does not have yet",
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


def _named_dtype(dtype: str) -> str | None:
    """The type if the user named it;
    ``None`` has weights that are stored sent as they are."""
    source = click.get_current_context().get_parameter_source("dtype")
    return None if source is click.core.ParameterSource.DEFAULT else dtype


def _push_facts(push_plan: PushPlan, warnings: Sequence[str]) -> dict[str, Any]:
    """The facts that a push and its preview have in common."""
    from ckpt.cli.results.hub import LeftOut

    remote = push_plan.remote
    return {
        "repo": remote.repo,
        "revision": remote.branch,
        "exists": remote.head is not None,
        "private": push_plan.private,
        "new_revision": remote.new,
        "path": push_plan.checkpoint.folder,
        "step": push_plan.checkpoint.step,
        "transport": push_plan.transport,
        "message": push_plan.message,
        "nbytes": push_plan.contents.nbytes,
        "deleted": push_plan.deleted,
        "left_out": tuple(LeftOut(*entry) for entry in push_plan.contents.left_out),
        "warnings": tuple(warnings),
    }


def _push_preview(push_plan: PushPlan) -> PushPreview:
    from ckpt.cli.results.hub import PushPreview
    from ckpt.results import FileEntry

    files = tuple(FileEntry(push_plan.place + item.name, item.nbytes) for item in push_plan.items)
    return PushPreview(dry_run=True, files=files, **_push_facts(push_plan, push_plan.warnings))


def _preview_lines(push_plan: PushPlan) -> list[str]:
    """A dry run for a reader."""
    from ckpt.text import size

    remote = push_plan.remote
    lines = [f"send\t{push_plan.place}{item.name}\t{size(item.nbytes)}" for item in push_plan.items]
    lines += [f"delete\t{name}" for name in push_plan.deleted]
    lines += [f"left out\t{name}\t{reason}" for name, reason in push_plan.contents.left_out]
    creation = f"would be created, {'private' if push_plan.private else 'public'}"

    return [
        *lines,
        f"repository   {remote.repo}, {'exists' if remote.head else creation}",
        f"revision     {remote.branch}{', new' if remote.new else ''}",
        f"bytes        {size(push_plan.contents.nbytes)}",
        f"transport    {push_plan.transport}",
    ]


def _left_out_lines(push_plan: PushPlan) -> list[str]:
    """A line on what stays here; a dry run says why."""
    from converters.words import some

    names = [name for name, _ in push_plan.contents.left_out]
    return [f"left out: {some(names)}; --dry-run says why"] if names else []


def _pushed(pushed: Pushed, remarks: Sequence[str] = ()) -> Output:
    from ckpt.cli.conversion import specials
    from ckpt.cli.results.hub import PushResult, SentFile

    committed = pushed.committed
    for warning in pushed.warnings[len(pushed.push_plan.warnings) :]:
        planned.say(warning)

    files = tuple(
        SentFile(
            name=file.path,
            nbytes=file.nbytes,
            sha256=file.sha256,
            status="sent" if file.moved and file.operation else "was there",
        )
        for file in pushed.files
    )
    result = PushResult(
        dry_run=False,
        url=committed.url,
        oid=committed.oid,
        new_commit=committed.is_new,
        pull_request=committed.pull_request,
        files=files,
        deleted_revisions=pushed.outdated,
        checks=pushed.checks,
        seconds=round(pushed.seconds, 3),
        **_push_facts(pushed.push_plan, pushed.warnings),
    )
    notices = [*remarks, *_left_out_lines(pushed.push_plan), pushed.summary()]
    notices += specials(pushed.checks) if pushed.checks else ()
    return Output(
        result,
        [committed.pull_request or committed.url],
        [f"ckpt: {notice}" for notice in notices],
    )


@click.command(cls=Command, short_help="Fetch a repository into a new folder.")
@click.argument("source", metavar="ORG/NAME[@REVISION]")
@click.argument("folder", metavar="DIR", type=OUTPUT_PATH)
@click.option("--path-in-repo", metavar="FOLDER", help="Only this folder of the repository.")
@dry_run_option("Say what would be fetched, and fetch nothing.")
@JSON
def pull(source: str, folder: Path, path_in_repo: str | None, dry_run: bool, as_json: bool) -> None:
    """Fetch a repository from the Hugging Face Hub into a new folder, whole or not at all.

    Every file is compared with the digest that the Hub lists. A training state is
    verified by its manifest too, so that a training can go on from it.

    \b
    ckpt pull org/name model
    ckpt pull org/name@step-500 out/checkpoint-500
    """
    from ckpt.hub import pull as pulling
    from ckpt.hub.client import errors

    errors.require_client()
    errors.quiet()
    repo, _, revision = source.partition("@")
    pull_plan = pulling.plan(repo, folder, revision=revision or None, path_in_repo=path_in_repo)

    def preview() -> Output:
        pulling.require_output(pull_plan)
        return _pull_preview(pull_plan)

    def interruption() -> str | None:
        if not pulling.is_begun(pull_plan):
            return planned.interruption(None)
        return "the same command goes on with the files that have come"

    planned.run(
        Planned(
            preview=preview,
            execute=lambda progress: _pulled(pulling.execute(pull_plan, progress)),
            nbytes=pull_plan.nbytes,
            title=repo,
            interruption=interruption,
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


def _pull_result(
    pull_plan: PullPlan, step: int | None = None, seconds: float | None = None
) -> PullResult:
    from ckpt.cli.results.hub import PulledFile, PullResult

    files = tuple(
        PulledFile(
            name=name,
            nbytes=repo_file.size,
            sha256=repo_file.sha256,
            git_blob=repo_file.blob,
        )
        for name, repo_file in pull_plan.placed_files.items()
    )
    return PullResult(
        dry_run=seconds is None,
        output=pull_plan.folder,
        repo=pull_plan.repo,
        revision=pull_plan.revision,
        oid=pull_plan.oid,
        step=step,
        nbytes=pull_plan.nbytes,
        files=files,
        seconds=seconds,
    )


def _pull_preview(pull_plan: PullPlan) -> Output:
    from ckpt.text import size

    lines = [
        f"fetch\t{pull_plan.folder / name}\t{size(repo_file.size)}"
        for name, repo_file in pull_plan.placed_files.items()
    ]
    total = f"bytes        {size(pull_plan.nbytes)}"
    return Output(_pull_result(pull_plan), [*lines, f"commit       {pull_plan.oid}", total])


def _pulled(pulled: Pulled) -> Output:
    return Output(
        _pull_result(pulled.pull_plan, pulled.step, round(pulled.seconds, 3)),
        [pulled.pull_plan.folder],
        [f"ckpt: {pulled.summary()}"],
    )


COMMANDS = (push, pull)
