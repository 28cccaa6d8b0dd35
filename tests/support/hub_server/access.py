"""Who asks, and what they may do: tokens, owners, private repositories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request

from .errors import HubError, no_repo
from .repos import Repo, Repos
from .store import Store

TOKEN, READ_TOKEN = "hf_test_write", "hf_test_read"


@dataclass(frozen=True, slots=True)
class User:
    name: str
    orgs: tuple[str, ...]
    role: str  # "write" or "read"


@dataclass(frozen=True, slots=True)
class Server:
    """What the handlers share; ``app.state.server``."""

    repos: Repos
    store: Store
    users: dict[str, User]  # by token
    multipart_over: int  # bytes; a larger LFS file is uploaded in parts
    part_size: int  # bytes
    page: int  # entries in one answer of a list
    xet: str  # "http": cas.py is the CAS; "local": hf_xet writes into the store itself


def server(request: Request) -> Server:
    found: Server = request.app.state.server
    return found


def param(request: Request, name: str) -> str:
    """A part of the path: routes see it quoted, so that ``refs%2Fpr%2F1`` is one part."""
    return unquote(request.path_params[name])


# InvalidToken and NoToken are codes of our own: the client goes by the status and the message.


def user(request: Request) -> User | None:
    """Who the token names; None without a token."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    found = server(request).users.get(header.removeprefix("Bearer "))
    if found is None:
        raise HubError(401, "Invalid credentials in Authorization header", "InvalidToken")
    return found


def needs_user(request: Request) -> User:
    found = user(request)
    if found is None:
        raise HubError(401, "Invalid username or password.", "NoToken")
    return found


def may_write(who: User, owner: str) -> bool:
    return who.role == "write" and (owner == who.name or owner in who.orgs)


def repo(request: Request, write: bool = False) -> Repo:
    """The repository of the path. What the caller may not see does not exist, as on the Hub."""
    kind = request.path_params.get("kind", "models")
    owner = param(request, "owner")
    name = f"{owner}/{param(request, 'name').removesuffix('.git')}"
    who = user(request)
    member = who is not None and (owner == who.name or owner in who.orgs)
    try:
        found = server(request).repos.get(kind, name)
        if found.state["visibility"] == "private" and not member:
            raise no_repo()
    except HubError:
        if who is None:
            message = "Invalid username or password."
            raise HubError(401, message, "RepoNotFound") from None
        raise
    if found.state["gated"] and not member and "/resolve/" in request.url.path:
        message = f"Access to model {name} is restricted."
        raise HubError(401 if who is None else 403, message, "GatedRepo")
    if write:
        allowed(needs_user(request), owner, kind)
    return found


def allowed(who: User, owner: str, kind: str) -> None:
    if not may_write(who, owner):
        message = f"You don't have the rights to write to a {kind[:-1]} under the namespace"
        raise HubError(403, f'{message} "{owner}"')


def whoami(who: User) -> dict[str, Any]:
    return {
        "type": "user",
        "id": who.name,
        "name": who.name,
        "fullname": who.name,
        "orgs": [{"type": "org", "name": org, "roleInOrg": who.role} for org in who.orgs],
        "auth": {
            "type": "access_token",
            "accessToken": {"displayName": "test", "role": who.role},
        },
    }
