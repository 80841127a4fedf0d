"""The drop-in for OpenRLHF 0.11.2: what its trainers compute between rollouts and optimizer comes from fastreward.

In one process (a script, SFT, DPO): `fastreward.patch.openrlhf()`. With Ray, where actors, critic and the trainer
itself are workers, one of

    ray.init(runtime_env=fastreward.patch.openrlhf_runtime_env())
    python -m fastreward.patch.openrlhf openrlhf.cli.train_ppo_ray ...      (--metrics before the module logs usage)
    ray job submit --runtime-env-json '{"worker_process_setup_hook": "fastreward.patch.openrlhf.workers.apply"}' ...

Served: log-probs and entropies (`Actor.forward`, which makes no float32 copy of the logits, reads them once and skips
prompts; `log_probs_from_logits`, `compute_entropy`), `PolicyLoss`, `ValueLoss`, `aggregate_loss` (SFTLoss's and the
entropy bonus's too), `compute_approx_kl`, `compute_reward`, `masked_mean`, GAE, returns, group baselines, normalisation
and length penalties of the experience maker, and `karmarkar_karp`. Conventions are OpenRLHF's: its sums decay through
masked tokens, a deviation has ddof 1 and eps 1e-9, a group of one is NaN, estimates of the KL are cut at +-10.

What differs: `output["logits"]` stay as the model gave them; entropies are 0 outside the action mask, advantages 0
before the first action; NaN under a mask stays there; sums are made in float64. None of it is read by OpenRLHF.
Every function is recognised by its source, in whatever version it is, and left alone where it is another. Calls that
fastreward does not take go to OpenRLHF's own function; `fastreward.patch.status()` counts them. No GPU has run it yet:
`openrlhf(devices=("cpu",))` leaves tensors on a GPU to OpenRLHF.
"""

from __future__ import annotations

from fastreward.patch.openrlhf.apply import openrlhf as openrlhf
from fastreward.patch.openrlhf.workers import openrlhf_runtime_env as openrlhf_runtime_env
