"""The command ``ckpt``: parses, calls, prints.

main            the groups of commands, and the door for failure
weights         show, to-fp32
rewrite         reshard, to-universal, from-universal;  crossing/  to-dcp, from-dcp
joining/        join, which ends what these began in shares
runs            ls, prune, pin, unpin;  verify, latest  the commands of these names
maintenance     slim, collect;  doctor  the command of this name
hub             push, pull
inspection/     stats, diff
planned         dry run, bar of bytes, JSON and messages, of them all
results/        what they print, as values
usage/          what was typed wrong, and what to type instead
options         options that several commands have
weight_options  which weights, under which names
conversion, report, listing, adapter_facts   results and lines of to-fp32, show, ls
"""
