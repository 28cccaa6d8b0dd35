"""The commands that look at the numbers of checkpoints.

numbers   stats;  differences  diff
tables    aligned on a terminal, separated by tabs elsewhere
"""
