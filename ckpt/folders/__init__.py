"""Folders that are there whole or not at all.

staging     work in a folder that takes its name at the end, and can be continued
replacing   how a folder takes its name
locks       who reads a checkpoint
filenames   names of files beside the data
scratch     a folder of one process, while it makes something
leftovers   what the start of a training left
"""
