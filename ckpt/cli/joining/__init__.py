"""The command that ends what other commands began in shares.

join   makes the output of the shares that they wrote
"""
