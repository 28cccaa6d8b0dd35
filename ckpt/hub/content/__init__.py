"""The contents that a push publishes.

contents     the files, chosen by allow_list; model_contents those of a model or an adapter
allow_list   which files may be published
items        a file and its name in the repository, and all of a push
publishable  what may be sent of it, and whether anybody could load it
secrets, suspicions, local_paths  what must not be published
card, model_facts, loss_curve  the model card
"""
