"""Runs: what a save committed, what may be deleted, and how to put right what a crash left.

    digests      what binds the bytes of a file, and files checked against it
    manifest     the commit record of a checkpoint
    run          the checkpoints of a folder, and the pointers latest and best
    locks        who reads a checkpoint right now
    retention    which checkpoints to keep: a value and a pure function
    pruning      deletion that no crash turns into half a checkpoint
    verify       whether a checkpoint is whole
    listing      what a person reads of a run
    leftovers    what the start of a training left that failed
    torn doctor adoption    what a crash left, and what was written without ckpt
    slim         full to weights-only
    collect      the parts of several nodes, joined
    commands upkeep         parse, call, print

Nothing here imports torch: a run is managed from any machine that sees its folder.
"""
