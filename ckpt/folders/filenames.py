"""The names of files that a save, a conversion or a repair leaves beside the data."""

from __future__ import annotations

from converters.detect.filenames import MANIFEST as MANIFEST

PINNED = ".pinned"  # in a checkpoint that retention never deletes
LOCK = ".lock"  # what whoever writes a staging folder (.NAME.saving) holds a lock on
PLAN = "plan.json"  # what an interrupted conversion goes on by
LOGBOOK = "written.jsonl"  # which of its files were whole, and what was proven by then
COMMAND = "command.json"  # what several processes were called with, each for its share
JOINED = ".joined"  # in what they made, once nothing but its name is to be done
REWRITING = "rewriting.json"  # what a checkpoint without a manifest was made of
CONVERSION = "conversion.json"  # in what ckpt to-fp32 made
