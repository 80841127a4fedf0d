"""Stands for openrlhf.cli.train_ppo_ray: starts Ray itself, with an environment of its own, and two actors."""

from __future__ import annotations

import json
import os
import sys

import ray
import torch
from openrlhf_worker import Scorer

if __name__ == "__main__":
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"NCCL_DEBUG": "INFO", "PYTHONPATH": os.environ["PYTHONPATH"]}},
    )
    log_probs, base = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    actors = [ray.remote(Scorer).remote() for _ in range(2)]
    found = ray.get([actor.kl.remote(log_probs, base) for actor in actors])
    result = {
        "arguments": sys.argv[1:],
        "values": [value.tolist() for value, _, _ in found],
        "served": [served for _, served, _ in found],
        "processes": len({process for *_, process in found} | {os.getpid()}),
    }
    ray.shutdown()
    print("RESULT", json.dumps(result))
