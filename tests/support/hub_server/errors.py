"""What the Hub answers when it refuses: a status, a code and a sentence, in headers and body.

The client makes its exceptions of X-Error-Code (RepoNotFound, RevisionNotFound,
EntryNotFound, GatedRepo) and X-Error-Message: hf_raise_for_status in its utils/_http.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse

QUOTA = (
    "Private repository storage limit reached, please upgrade your plan"
    " to increase your private storage limit."
)


class HubError(Exception):
    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        headers = {"X-Error-Message": self.message, **self.headers}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return JSONResponse({"error": self.message}, self.status, headers)


async def answer(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HubError)
    return error.response()


def no_repo() -> HubError:
    return HubError(404, "Repository not found", "RepoNotFound")


def no_revision(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def no_entry(path: str) -> HubError:
    return HubError(404, f"Entry not found: {path}", "EntryNotFound")
