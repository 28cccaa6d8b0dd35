"""Carries a plan out: reads, checks, casts and writes bytes.

workers        the threads that move a shard
source_reader  the bytes of a tensor, read and verified
replicas       what several ranks have of one tensor, compared
source_files   the files that a thread holds open
shards         a plan as files, each whole or not at all
small_files    a plan of many small files
plan_shares    a plan divided among processes, at equal bytes
shares         what each of them writes, and how their shares are joined
logbook        what an interrupted run wrote and proved;  passage  what was seen as it passed
virtual_file   a plan as file objects whose bytes are made when they are read
prefetch       makes them before they are asked for
nonfinite      counts NaN and infinities
plain_rounding compares a small model with its 16-bit copy
"""
