"""The common ground of states that more than ZeRO split up:
files of several kinds and ranks.

folder_files     the files of a tag, by every number in their names
one_save         whether they are of one save
computed_weights what the model computes with, of any such kind
joined_source    from parameters to a ``Source``
numbered_states  what torch's optimizers keep, by number
"""
