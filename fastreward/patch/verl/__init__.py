"""The drop-in for verl 0.9: what its trainers compute between rollouts and optimizer comes from fastreward.

`fastreward.patch.verl()` applies it in this process. Installing fastreward is enough for it to be applied in every
process that imports verl, the driver and each Ray worker: `plugin.py` is an entry point of verl's group `verl.plugins`.
It says so in one line on stderr, and in one line more for each function that it could not replace. FASTREWARD_VERL=off
turns it off, and so does verl's own VERL_USE_EXTERNAL_PLUGINS=none.

What is served, each with verl's results, dtypes and conventions (the files of this folder say which):
    advantages      every estimator of ADV_ESTIMATOR_REGISTRY, and the two that the trainer calls by name
    rewards         kl_penalty, compute_rewards, apply_kl_penalty
    losses          the policy losses of POLICY_LOSS_REGISTRY (but clip_cov: it draws at random), agg_loss, value loss
    log-probs       logprobs_from_logits and kin, entropies, sum of squares; the fused LM heads on the CPU
    tensors         masked_sum, _mean, _var and _whiten, padding, rows of a batch, balancing of sequences over ranks
    recipes         under verl's configuration, by names of fastreward's: see `methods.py`

        algorithm.adv_estimator=fastreward.tempo
        actor_rollout_ref.actor.policy_loss.loss_mode='"fastreward.dispo(pos_high=5.0)"'

Other than verl's: under the mask advantages, returns and whitened values are 0, where verl leaves what its recurrences
carried there; and what lies under it, NaN too, reaches no result, where verl multiplies it by 0. A call with what
fastreward does not take (float64, weights for a mask, labels other than strings and integers, a DTensor, ...) goes on
to verl's own function, whose errors are the errors; `patch.status()` counts those beside the calls it serves.

Each file of this folder has the replacements of one kind and a table of them; `tables.py` puts the tables together and
`apply.py` binds what they list, wherever verl has bound it: in every module that imported the name, in verl's
registries, and in modules that are imported later. A function with another signature or source (`sources.py`) than is
expected is left alone, with a line in the report and a warning. `undo()` restores every binding.
"""

from __future__ import annotations

from fastreward.patch.verl.apply import verl as verl
