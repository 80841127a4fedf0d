"""Functions for slime's options of the form --custom-...-function-path, as it loads and calls them.

    --loss-type custom_loss --custom-loss-function-path    fastreward.patch.slime.loss
    --custom-advantage-function-path                       fastreward.patch.slime.advantages
    --custom-tis-function-path                             fastreward.patch.slime.tis
    --custom-pg-loss-reducer-function-path                 fastreward.patch.slime.pg_loss_reducer
    --custom-reward-post-process-path                      fastreward.patch.slime.rewards

As they are they compute what slime computes. Under the keys fastreward_loss, fastreward_advantages, fastreward_tis and
fastreward_rewards of the file of --custom-config-path (or in the environment: FASTREWARD_SLIME_LOSS, ...) each takes a
recipe with its options, such as `fastreward_loss: dispo(pos_high=5.0)`. `patch.status()` shows their use. Read in slime
at commits 624b824 and 00c2d6d; no version of it is on a package index.
"""

from __future__ import annotations

from fastreward.patch.slime.credit import advantages, rewards
from fastreward.patch.slime.policy import loss
from fastreward.patch.slime.weights import pg_loss_reducer, tis

__all__ = ["advantages", "loss", "pg_loss_reducer", "rewards", "tis"]
