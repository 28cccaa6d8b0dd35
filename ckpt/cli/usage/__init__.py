"""Mistakes on the command line, and what to type instead.

synonyms  a command that is not there;  command  an argument too many
"""
