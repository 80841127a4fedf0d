"""A step of a tiny model on verl's FSDP engine, on the CPU over gloo, as verl has it and under the patch.

`python verl_engine.py FOLDER` prints what both steps gave, as JSON. verl knows accelerators only: its own seam for
others, a platform, is given one whose device is the CPU, and nothing of the engine is replaced.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ |= {
    "FASTREWARD_VERL": "off",
    "VERL_PLATFORM": "cpu",
    "MASTER_ADDR": "127.0.0.1",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
import verl.plugin.platform.platform_base as platforms
from verl.plugin.platform.platform_manager import PlatformRegistry

VOCABULARY, PROMPT, RESPONSE, ROWS = 64, 4, 6, 4


class Cpu(platforms.PlatformBase):
    """The CPU as one of verl's platforms."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def __getattribute__(self, name: str) -> Any:
        quiet = ("set_device", "synchronize", "manual_seed", "manual_seed_all", "empty_cache", "cudart")
        return (lambda *_, **__: None) if name in quiet else super().__getattribute__(name)

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CPU_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return nullcontext()

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None


Cpu.__abstractmethods__ = frozenset()  # settings of allocators and profilers, which nothing here asks for
PlatformRegistry.register("cpu")(Cpu)

import functools  # noqa: E402

import torch.distributed  # noqa: E402
import transformers  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl.models.transformers import monkey_patch  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers import config as configs  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402
from verl.workers.utils import losses, padding  # noqa: E402

from fastreward import patch  # noqa: E402

monkey_patch.is_trl_available = lambda: False  # verl 0.9.1 imports a class that TRL 1.16 no longer has


def save_model(folder: Path) -> None:
    """A random Qwen2 of two layers."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def rollouts() -> Any:
    """A mini-batch as verl's trainer hands it to a worker."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.tensor([[4], [2], [3], [4]])
    responses = torch.tensor([[6], [3], [1], [5]])
    of_response = torch.arange(RESPONSE) < responses
    mask = torch.cat([torch.arange(PROMPT) >= PROMPT - prompts, of_response], dim=1).long()
    ids = torch.randint(0, VOCABULARY, mask.shape, generator=g) * mask
    data = TensorDict(
        {
            "prompts": ids[:, :PROMPT].clone(),
            "responses": ids[:, PROMPT:].clone(),
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "response_mask": of_response.long(),
            "old_log_probs": -4.2 + 0.1 * torch.randn(ROWS, RESPONSE, generator=g),
            "ref_log_prob": -4.2 + 0.1 * torch.randn(ROWS, RESPONSE, generator=g),
            "advantages": torch.randn(ROWS, RESPONSE, generator=g),
        },
        batch_size=ROWS,
    )
    tu.assign_non_tensor(
        padding.left_right_2_no_padding(data),
        temperature=0.9,
        calculate_entropy=True,
        use_remove_padding=False,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=16,
        global_batch_size=ROWS,
    )
    return data


def step(folder: Path) -> dict[str, Any]:
    """`train_batch` of a fresh engine: its metrics, and all weights afterwards."""
    fp32 = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    engine = FSDPEngineWithLMHead(
        configs.HFModelConfig(
            path=str(folder),
            load_tokenizer=False,
            override_config={"attn_implementation": "sdpa"},
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
        ),
        configs.FSDPEngineConfig(strategy="fsdp2", fsdp_size=1, use_torch_compile=False, mixed_precision=fp32),
        configs.FSDPOptimizerConfig(lr=1e-2, total_training_steps=10),
        CheckpointConfig(),
    )
    engine.initialize()
    actor = configs.ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        entropy_coeff=0.01,
        use_kl_loss=True,
        policy_loss=configs.PolicyLossConfig(),
    )
    start = _weights(engine)
    with engine.train_mode():
        outputs = engine.train_batch(rollouts(), functools.partial(losses.ppo_loss, actor))
    metrics = {name: _numbers(x) for name, x in outputs["metrics"].items()}
    return {"metrics": metrics, "start": start, "weights": _weights(engine)}


def _weights(engine: Any) -> list[float]:
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in engine.module.parameters()]
    return torch.cat([p.detach().flatten() for p in whole]).tolist()  # type: ignore[no-any-return]


def _numbers(metric: Any) -> list[float]:
    if hasattr(metric, "values") and not isinstance(metric, dict):
        metric = metric.values
    return [float(x) for x in (metric if isinstance(metric, list | tuple) else [metric])]


def main() -> None:
    """Both steps, as JSON on the last line."""
    folder = Path(sys.argv[1])
    save_model(folder)
    os.environ["MASTER_PORT"] = sys.argv[2]
    torch.distributed.init_process_group("gloo")
    stock = step(folder)
    patch.verl()
    ours = step(folder)
    assert stock.pop("start") == ours["start"]
    usage = {name: usage.calls for name, usage in patch.status()["verl"].usage.items() if usage.calls}
    torch.distributed.destroy_process_group()
    print(json.dumps({"stock": stock, "ours": ours, "usage": usage, "start": ours.pop("start")}))


if __name__ == "__main__":
    main()
