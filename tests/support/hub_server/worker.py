"""What the tests let the unmodified client do: functions, each asked for in a line of JSON.

A process of its own (client.py), since huggingface_hub reads its environment at import.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError


def push(model: str, repo: str, token: str | bool | None = None, **more: Any) -> dict[str, Any]:
    """Pushes a folder in one commit; an error is returned by its type and sentence."""
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        paths = sorted(path for path in Path(model).rglob("*") if path.is_file())
        adds = [CommitOperationAdd(path.relative_to(model).as_posix(), path) for path in paths]
        done = api.create_commit(repo, adds, commit_message="a model", **more)
    except (OSError, RuntimeError, ValueError, httpx2.HTTPError) as error:
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        return {"error": type(error).__name__, "status": status, "says": f"{error} {cause}"}
    return {"url": str(done), "oid": done.oid, "pr": done.pr_revision, "repo": str(url)}


def pull(repo: str, folder: str, revision: str | None = None) -> dict[str, Any]:
    api = HfApi()
    snapshot_download(repo, revision=revision, local_dir=folder)
    checked = api.verify_repo_checksums(repo, local_dir=folder, revision=revision)
    return {"checked": checked.checked_count, "wrong": [str(m) for m in checked.mismatches]}


def look(repo: str, token: str | bool | None = None) -> str:

    try:
        return HfApi(token=token).repo_info(repo).sha or ""
    except HfHubHTTPError as error:
        return f"{type(error).__name__} {error.response.status_code}"


def upkeep(repo: str) -> dict[str, Any]:
    api = HfApi()
    head = api.repo_info(repo).sha
    api.create_branch(repo, branch="step-5")
    api.create_branch(repo, branch="step-5", exist_ok=True)
    api.create_branch(repo, branch="feature/a")
    api.create_tag(repo, tag="v1", revision="feature/a")
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationDelete("code/"),
        CommitOperationDelete("config.json"),
        CommitOperationCopy("model-2.safetensors", "copy.safetensors"),
        CommitOperationAdd("new/.gitignore", b"*.log\n"),
    ]
    api.create_commit(repo, operations, commit_message="tidy", revision="step-5")
    found = {
        "files": api.list_repo_files(repo, revision="step-5"),
        "top": [item.path for item in api.list_repo_tree(repo)],
        "info": [item.path for item in api.get_paths_info(repo, ["code", "README.md", "nothing"])],
        "last": {
            item.path: item.last_commit and item.last_commit.title
            for item in api.list_repo_tree(repo, revision="step-5", expand=True)
        },
        "titles": [commit.title for commit in api.list_repo_commits(repo, revision="step-5")],
    }
    errors = {}
    calls: dict[str, Callable[[], object]] = {
        "branch": lambda: api.list_repo_files(repo, revision="nothing"),
        "folder": lambda: list(api.list_repo_tree(repo, "nothing")),
        "file": lambda: api.hf_hub_download(repo, "nothing"),
        "delete": lambda: api.delete_file("nothing", repo),
        "main": lambda: api.delete_branch(repo, branch="main"),
        "twice": lambda: api.create_tag(repo, tag="v1"),
        "name": lambda: api.create_branch(repo, branch="a..b"),
    }
    for name, call in calls.items():
        try:
            call()
            errors[name] = "nothing"
        except (RevisionNotFoundError, EntryNotFoundError) as error:
            errors[name] = type(error).__name__
        except HfHubHTTPError as error:
            errors[name] = str(error.response.status_code)
    api.super_squash_history(repo, branch="step-5")
    api.delete_branch(repo, branch="feature/a")
    refs = api.list_repo_refs(repo)
    squashed = len(api.list_repo_commits(repo, revision="step-5"))
    weights = [file for file in api.list_lfs_files(repo) if file.filename == "model-1.safetensors"]
    api.permanently_delete_lfs_files(repo, weights)
    return found | {
        "errors": errors,
        "branches": sorted(ref.name for ref in refs.branches),
        "tags": {ref.name: ref.target_commit == head for ref in refs.tags},
        "squashed": squashed,
        "left": api.list_repo_files(repo),
    }


def commit_after_damage(path: str, repo: str, cas: str) -> str:
    """Uploads a file, changes a byte of every xorb that came with it, and tries to commit it."""
    api, xorbs = HfApi(), Path(cas, "xet/xorbs/xorbs")
    api.create_repo(repo, private=True)
    add = CommitOperationAdd("model.safetensors", path)
    before = set(xorbs.glob("default.*"))
    api.preupload_lfs_files(repo, [add], free_memory=False)
    for xorb in set(xorbs.glob("default.*")) - before:
        data = bytearray(xorb.read_bytes())
        data[1000] ^= 1
        xorb.write_bytes(data)
    try:
        api.create_commit(repo, [add], commit_message="damaged")
    except HfHubHTTPError as error:
        return str(error)
    return "committed"


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(globals()[asked["what"]](**asked["args"])), flush=True)
