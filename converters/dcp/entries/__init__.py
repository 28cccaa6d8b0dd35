"""The entries that ``.metadata`` is made of.

description  what a folder holds, in the end
records      what the file has most of, as the interpreter makes it
places       where items lie
one_save     whether ``.metadata`` and those of ranks are of one save
"""
