"""Runs: what a save committed, what may be deleted, and how to put right what a crash left.

    manifest     the commit record of a checkpoint, its digests, and checks against them
    run          the checkpoints of a folder, and the pointers latest and best
    locks        who reads a checkpoint right now
    retention    which checkpoints to keep: a value and a pure function
    pruning      deletion that no crash turns into half a checkpoint
    slim doctor collect     the commands of these names
    commands     parse, call, print

Nothing here imports torch: a run is managed from any machine that sees its folder.
"""
