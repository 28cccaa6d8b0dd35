"""Writes docs/cli.md, the reference of the command line, from what ``--help`` prints.

    python scripts/make_cli_reference.py            write the page
    python scripts/make_cli_reference.py --check    exit with 1 where the page is not up to date

``tests/commands/test_docs.py`` compares the page with the program, so run this after each change of
a help text. The width is fixed, so that the page does not depend on the terminal.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve()
while not (ROOT / "pyproject.toml").is_file():
    ROOT = ROOT.parent

PAGE = ROOT / "docs" / "cli.md"
WIDTH = 78  # columns, as click prints on a terminal of 80; it does not wrap examples

GROUPS = {  # the sections of the page; a command that no section names comes last
    "Weights": ("show", "stats", "diff", "to-fp32"),
    "Training states": (
        *("reshard", "to-universal", "from-universal"),
        *("to-dcp", "from-dcp", "join"),
    ),
    "Runs": (
        *("ls", "latest", "verify", "prune", "pin", "unpin"),
        *("doctor", "slim", "collect"),
    ),
    "The Hugging Face Hub": ("push", "pull"),
}
PAGES = {  # the page that explains a command
    "show": "to-fp32.md",
    "stats": "inspect.md",
    "diff": "inspect.md#how-two-checkpoints-differ",
    "to-fp32": "to-fp32.md",
    "push": "push.md",
    "pull": "push.md#to-resume-elsewhere",
    "reshard": "reshard.md",
    "to-universal": "universal.md",
    "from-universal": "universal.md#from-universal",
    "to-dcp": "zero-fsdp.md",
    "from-dcp": "zero-fsdp.md#what-from-dcp-has-to-know",
    "join": "scale.md",
}
RUNS = "runs.md"  # which explains all others

HEAD = """\
# The command line

Every command of `ckpt` with all its options, as `ckpt COMMAND --help` prints them. `python -m ckpt`
is the same as `ckpt`.

<!-- Made from the help texts by scripts/make_cli_reference.py: run that, do not edit this page. -->

- stdout is data. Warnings and progress go to stderr. `--json` prints the result, or the error, as
  JSON: [json.md](json.md) lists the keys.
- Exit codes: 0 done; 1 refused or failed, and one line on stderr says why and what to do; 2 bad
  usage; 130 interrupted.
- [api.md](api.md#the-promise) says which of all this later releases keep.
"""


def main() -> None:
    """Write the page, or compare it with the program."""
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(str(__doc__))

    text = page()
    if sys.argv[1:] and PAGE.read_text() != text:
        sys.exit("docs/cli.md is out of date; run: python scripts/make_cli_reference.py")

    if not sys.argv[1:]:
        PAGE.write_text(text)


def page() -> str:
    """The text of the page."""
    from ckpt.cli.main import cli, commands

    parts = [HEAD, block(context(cli, "ckpt"))]
    remaining = commands()
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [section(name, remaining.pop(name)) for name in names if name in remaining]

    if remaining:
        parts.append("## Others\n")
        parts += [section(name, command) for name, command in sorted(remaining.items())]
    return "\n".join(parts)


def section(name: str, command: click.Command) -> str:
    """A command: its name, its help, and where to read more."""
    from ckpt.cli.main import cli

    target = PAGES.get(name, RUNS)
    link = f"More: [{target.partition('#')[0]}]({target})\n"
    text = block(context(command, name, context(cli, "ckpt")))
    return "\n".join((f"### ckpt {name}\n", text, link))


def context(
    command: click.Command, name: str, parent: click.Context | None = None
) -> click.Context:
    """The context of a command as if it was called by name; a subcommand inherits settings."""
    settings = {**command.context_settings, "terminal_width": WIDTH}
    return click.Context(command, parent, name, **settings)


def block(context: click.Context) -> str:
    """What ``--help`` prints, as a block of text."""
    lines = (line.rstrip() for line in context.command.get_help(context).splitlines())
    return "\n".join(("```text", *lines, "```\n"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
