"""Repairs and changes of committed checkpoints.

doctor    what a crash left, found and put right, with
          findings, pointer_findings, uncommitted_findings: what is found, as values
adoption  a manifest for what was written without ckpt, of one_save as far as can be seen;
          manifest_writing writes it, saved_facts: what it says of the save
amending  a manifest made true again after files were deleted
slim      a full checkpoint made a weights-only one, whose kept_weights are complete, with
          kept_values: those of the states; stored_weights: the same for verify --data
collect   the parts of a save from several nodes, joined
"""
