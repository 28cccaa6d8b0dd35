"""Checkpoints on the Hugging Face Hub: push, pull,
and pushes in the background of a training.

push            plan, send, commit, verify;  plan  what comes and what goes
select          which checkpoint a path means;  wholeness  whether it may be pushed
content/        what is published, with its card
upload          the bytes on their way;  journal  what an interrupted push knows already
commit          one commit, or none;  download_check  what was sent, read back
pull            a repository as a folder, whole and verified
background      pushes while training;  child_process  the process that sends
client/         the Hub's client, retries, and its errors
"""
