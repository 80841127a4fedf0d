"""A worker of verl's own kind for the Ray tests, which its processes import by this file's name."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch
from verl import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo import core_algos
from verl.utils import seqlen_balancing
from verl.workers.config import ActorConfig, PolicyLossConfig

from fastreward import patch


class TrainingWorker(Worker):
    """Rewards with a KL penalty, advantages, policy loss and its gradient of the rows that reach this rank."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def compute(self, data: DataProto) -> DataProto:
        """As the plugin has left verl, and then as verl has it: fields "..." and "stock ..."."""
        found = self._computed(data)
        self.usage = {name: asdict(usage) for name, usage in patch.status()["verl"].usage.items() if usage.calls}
        patch.undo()
        stock = self._computed(data)
        return DataProto.from_dict({**found, **{f"stock {name}": x for name, x in stock.items()}})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def report(self) -> dict[str, Any]:
        """Of this process: its rank, and what fastreward has served in `compute`."""
        return {"process": os.getpid(), "rank": self.rank, "usage": self.usage}

    def _computed(self, data: DataProto) -> dict[str, torch.Tensor]:
        given = data.batch
        kl = core_algos.kl_penalty(given["old_log_probs"], given["ref_log_prob"], "low_var_kl")
        rewards = given["scores"] - 0.01 * kl * given["response_mask"]
        advantages, returns = core_algos.compute_gae_advantage_return(
            rewards, given["values"], given["response_mask"], 1.0, 0.95
        )
        logprobs = (given["old_log_probs"] + 0.1 * given["values"]).requires_grad_()
        config = ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=PolicyLossConfig()
        )
        loss, _ = core_algos.get_policy_loss_fn("vanilla")(
            given["old_log_probs"], logprobs, advantages, given["response_mask"], config=config
        )
        loss.backward()
        parts = seqlen_balancing.get_seqlen_balanced_partitions(given["response_mask"].sum(-1).tolist(), 2, True)
        return {
            "kl": kl,
            "advantages": advantages * given["response_mask"],  # beyond a response nobody looks
            "returns": returns * given["response_mask"],
            "loss": loss.detach().expand(len(data)).clone(),
            "gradient": logprobs.grad,
            "order": torch.tensor([i for part in parts for i in part]),
        }
