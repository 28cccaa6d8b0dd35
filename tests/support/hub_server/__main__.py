"""``python -m tests.hub_server FOLDER --port P``: the test Hub by hand."""

from __future__ import annotations

import os
import sys
import threading
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path

from .access import READ_TOKEN, TOKEN
from .app import serve


def main() -> None:
    parser = ArgumentParser(prog="tests.hub_server", description=f"Tokens: {TOKEN}, {READ_TOKEN}.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--orgs", default="org", help="organizations of both tokens, by commas")
    parser.add_argument("--multipart-over", type=int, default=32 << 20, help="bytes")
    parser.add_argument("--part-size", type=int, default=16 << 20, help="bytes")
    parser.add_argument("--page", type=int, default=1000, help="entries in one answer of a list")
    parser.add_argument("--xet", choices=("http", "local"), default="http", help="the CAS")
    parser.add_argument("--check-xet", action=BooleanOptionalAction, default=True)
    parser.add_argument("--owned", action="store_true", help="ends when standard input does")
    options = vars(parser.parse_args())
    if options.pop("owned"):
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    serve(options.pop("folder"), options.pop("port"), **options)


if __name__ == "__main__":
    main()
