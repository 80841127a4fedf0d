"""The drop-in for TRL 1.14 to 1.16: log-probs and entropies from fastreward, on request GRPO's and RLOO's losses too.

    import fastreward
    fastreward.patch.trl()                     # log-probs and entropies of every trainer
    fastreward.patch.trl(losses=True)          # also GRPO's and RLOO's own loss, with its metrics
    fastreward.patch.undo("trl")

`scores.py` has the log-probs, `trainers.py` and `objective.py` the losses, `versions.py` what is looked for in each
version of TRL before anything is replaced, `callback.py` what a run logs about the patch; `apply.py` binds them.
"""
