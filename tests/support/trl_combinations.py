"""TRL's trainers and what people run them with, as a table: each row trains a tiny model, stock and patched.

`COMBINATIONS` is data: the trainer, its options, the model, adapters, ranks. `run` takes one row's steps and gives what
can be compared (losses, all that is logged, the weights), `both_sides` does so stock and patched. The quick rows are
tests, all of them are rows of docs/compat.md. Everything is made here: no hub, no download.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import contextlib
import importlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastreward.patch.trl.versions import supported_version

WORDS = [f"{a}{b}" for a in "bcdfgklm" for b in "aeiou"]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
HEAD, LOSS = "_ChunkedLogProbFunction", "_compute_loss"
LOGITS, BOTH = "selective_log_softmax", "selective_log_softmax_and_entropy"


@dataclass(frozen=True)
class Combination:
    """One row. served: the last part of the names of replaced functions that must have been at work.

    options go to the trainer's config, patch to `fastreward.patch.trl`. ranks: how many processes, and in which way
    ("ddp", "fsdp2"). rtol: allowed between the two sides, relative to max(1, |TRL's|). jumping: what is logged that
    rounding alone can change by any amount, which is not compared.
    """

    name: str
    trainer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "qwen2"
    peft: Mapping[str, Any] | None = None
    patch: Mapping[str, Any] = field(default_factory=dict)
    served: tuple[str, ...] = (HEAD,)
    ranks: str | None = None
    quick: bool = False
    rtol: float = 1e-5
    jumping: tuple[str, ...] = ()


_LOSSES = {"losses": True}
_WITH_LOSS = (HEAD, LOSS)
_KL = {"beta": 0.1, "num_iterations": 2}
_LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def _grpo(name: str, **rest: Any) -> Combination:
    """GRPO with a reference model, two updates of each rollout, and its loss through fastreward."""
    options = {**_KL, **rest.pop("options", {})}
    return Combination(name, "grpo", options, patch=_LOSSES, served=_WITH_LOSS, **rest)


COMBINATIONS: tuple[Combination, ...] = (
    # every trainer that imports what is replaced
    Combination("SFT", "sft", quick=True),
    Combination("SFT, dft loss, packing", "sft", {"loss_type": "dft", "packing": True, "max_length": 32}, served=()),
    Combination("DPO", "dpo", quick=True),
    Combination("DPO, ipo and wpo weights", "dpo", {"loss_type": ["ipo", "sigmoid"], "use_weighting": True}),
    Combination(
        "DPO, reference precomputed",
        "dpo",
        {"precompute_ref_log_probs": True},
        jumping=("rewards/accuracies",),  # of the first step: whether rounding is above 0
    ),
    Combination("KTO", "kto", quick=True),
    Combination("GRPO", "grpo", _KL, quick=True),
    _grpo("GRPO, losses=True", quick=True),
    Combination("RLOO", "rloo", _KL),
    Combination("RLOO, losses=True", "rloo", _KL, patch=_LOSSES, served=_WITH_LOSS, quick=True),
    Combination("GMPO", "gmpo", _KL, patch=_LOSSES),
    Combination("A2PO", "a2po", served=(LOGITS,), quick=True),
    Combination("CPO", "cpo", served=(LOGITS,), quick=True),
    Combination("ORPO", "orpo", served=(LOGITS,), quick=True),
    Combination(
        "SDFT", "sdft", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}, served=(LOGITS,), quick=True
    ),
    Combination(
        "SDPO",
        "sdpo",
        {"distillation_mode": "sampled_token", "distillation_alpha": 1.0, "success_reward_threshold": 0.3},
        served=(LOGITS,),
        quick=True,
    ),
    Combination("TPO", "tpo", served=(BOTH,), quick=True),
    # adapters
    _grpo("GRPO, LoRA", peft=_LORA, quick=True),
    _grpo("GRPO, DoRA", peft={**_LORA, "use_dora": True}),
    _grpo("GRPO, LoRA, modules_to_save lm_head", model="qwen2 untied", peft={**_LORA, "modules_to_save": ["lm_head"]}),
    Combination("DPO, LoRA", "dpo", peft=_LORA),
    Combination("SFT, DoRA, untied head", "sft", model="qwen2 untied", peft={**_LORA, "use_dora": True}),
    Combination("KTO, LoRA", "kto", peft=_LORA),
    # models
    _grpo("GRPO, untied head (Llama)", model="llama"),
    _grpo("GRPO, softcapped logits (Gemma2)", model="gemma2", quick=True),
    _grpo("GRPO, scaled logits (Cohere)", model="cohere"),
    _grpo("GRPO, scaled logits (Granite)", model="granite"),
    _grpo("GRPO, mixture of experts (Mixtral)", model="mixtral"),
    Combination("DPO, softcapped logits (Gemma2)", "dpo", model="gemma2"),
    # ways to train
    _grpo("GRPO, gradient checkpointing", options={"gradient_checkpointing": True}),
    _grpo(
        "GRPO, checkpointing, reentrant",
        options={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    _grpo(
        "GRPO, accumulation, steps_per_generation",
        options={"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4},
        quick=True,
    ),
    _grpo("GRPO, bf16 autocast", options={"bf16": True}, rtol=2e-2),
    _grpo("GRPO, bf16 weights", model="qwen2 bf16", rtol=5e-2),
    _grpo("GRPO, cast_lm_head_to_fp32", model="qwen2 untied bf16", options={"cast_lm_head_to_fp32": True}, rtol=5e-2),
    Combination("DPO, bf16 autocast", "dpo", {"bf16": True}, rtol=2e-2),
    _grpo("GRPO, entropy bonus, top entropy", options={"entropy_coef": 0.01, "top_entropy_quantile": 0.5}),
    _grpo("GRPO, sequence level", options={"importance_sampling_level": "sequence", "loss_type": "grpo"}),
    *(_grpo(f"GRPO, loss_type {kind}", options={"loss_type": kind}) for kind in ("bnpo", "dr_grpo", "luspo", "vespo")),
    _grpo("GRPO, loss_type cispo", options={"loss_type": "cispo", "epsilon_high": 2.0}),
    _grpo("GRPO, loss_type sapo", options={"loss_type": "sapo"}),
    Combination(
        "GRPO, adaptive entropy (the loss is TRL's)",
        "grpo",
        {**_KL, "use_adaptive_entropy": True, "entropy_coef": 0.01},
        patch=_LOSSES,
    ),
    _grpo("GRPO, torch_compile", options={"torch_compile": True}, rtol=1e-4),
    # All of SFT's forward is one graph, and calls inside a graph are not counted.
    Combination("SFT, torch_compile", "sft", {"torch_compile": True}, served=(), rtol=1e-4),
    # more than one process, gloo on the CPU
    _grpo("GRPO, DDP, two ranks", ranks="ddp"),
    _grpo("GRPO, FSDP2, two ranks", ranks="fsdp2"),
    Combination("RLOO, DDP, two ranks", "rloo", _KL, patch=_LOSSES, served=_WITH_LOSS, ranks="ddp"),
    Combination("DPO, DDP, two ranks", "dpo", ranks="ddp"),
    Combination("DPO, FSDP2, two ranks", "dpo", ranks="fsdp2"),
    Combination("SFT, FSDP2, two ranks", "sft", ranks="fsdp2"),
)


# ------------------------------------------------------------------------------------------------------------- models
def tokenizer() -> Any:
    """A word-level tokenizer of some forty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **names)


def _shape(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.3,  # far from uniform, so that losses and gradients are of size
    } | more


#: (transformers' name of the model, what its config has beside the shape).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {"tie_word_embeddings": False}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 4.0, "sliding_window": 64}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "router_aux_loss_coef": 0.02}),
}


def model(name: str, folder: Path) -> Any:
    """A random model that can also be loaded from `folder`, where its reference model is looked for."""
    transformers = importlib.import_module("transformers")
    transformers.set_seed(3)
    bf16 = name.endswith(" bf16")
    kind, more = MODELS[name.removesuffix(" bf16")]
    config = getattr(transformers, f"{kind}Config")(**_shape(**more))
    built = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16 if bf16 else torch.float32)
    place = folder / name.replace(" ", "-")
    if int(os.environ.get("RANK", "0")) == 0 and not place.exists():
        built.save_pretrained(place)
    built.config._name_or_path = str(place)
    return built


# --------------------------------------------------------------------------------------------------------------- data
def _texts(count: int, length: int, seed: int) -> list[str]:
    picks = torch.randint(len(WORDS), (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(WORDS[i] for i in row[: 2 + n % (length - 1)]) for n, row in enumerate(picks)]


def _dataset(kind: str, count: int = 32) -> Any:
    from datasets import Dataset

    prompts, first, second, third = (_texts(count, length, seed) for seed, length in enumerate((5, 7, 6, 4)))
    columns: dict[str, list[Any]] = {
        "sft": {"prompt": prompts, "completion": [f" {x}" for x in first]},
        "pairs": {"prompt": prompts, "chosen": [f" {x}" for x in first], "rejected": [f" {x}" for x in second]},
        "kto": {
            "prompt": prompts,
            "completion": [f" {x}" for x in first],
            "label": [n % 2 == 0 for n in range(count)],
        },
        "prompts": {"prompt": prompts},
        "privileged": {"prompt": prompts, "privileged_context": third},
        "triples": {
            "prompt": prompts,
            "chosen": [f" {x}" for x in first],
            "rejected": [f" {x}" for x in second],
            "reference": [f" {x}" for x in third],
        },
    }[kind]
    return Dataset.from_dict(columns)


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of words with an "a", and something for length: it differs between rollouts."""
    words = [text.split() for text in completions]
    return [sum("a" in w for w in row) / max(len(row), 1) + 0.05 * len(row) for row in words]


# ----------------------------------------------------------------------------------------------------------- trainers
@dataclass(frozen=True)
class Kind:
    """How a trainer is made: where it is, its columns, what its config needs, whether it scores rollouts."""

    module: str
    name: str
    data: str
    options: Mapping[str, Any]
    rewards: bool = False


_ROLLOUTS = {"num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 8}
_EXPERIMENTAL = "trl.experimental."
KINDS: dict[str, Kind] = {
    "sft": Kind("trl", "SFT", "sft", {"per_device_train_batch_size": 8}),
    "dpo": Kind("trl", "DPO", "pairs", {"per_device_train_batch_size": 4}),
    "kto": Kind("trl", "KTO", "kto", {"per_device_train_batch_size": 8}),
    "grpo": Kind("trl", "GRPO", "prompts", _ROLLOUTS, rewards=True),
    "rloo": Kind("trl", "RLOO", "prompts", _ROLLOUTS, rewards=True),
    "gmpo": Kind(f"{_EXPERIMENTAL}gmpo", "GMPO", "prompts", _ROLLOUTS, rewards=True),
    "a2po": Kind(
        f"{_EXPERIMENTAL}a2po",
        "A2PO",
        "prompts",
        {"num_value_samples": 4, "max_completion_length": 8, "per_device_train_batch_size": 4},
        rewards=True,
    ),
    "cpo": Kind(f"{_EXPERIMENTAL}cpo", "CPO", "pairs", {"per_device_train_batch_size": 4, "max_length": 32}),
    "orpo": Kind(f"{_EXPERIMENTAL}orpo", "ORPO", "pairs", {"per_device_train_batch_size": 4, "max_length": 32}),
    "sdft": Kind(
        f"{_EXPERIMENTAL}sdft", "SDFT", "privileged", {"max_completion_length": 8, "per_device_train_batch_size": 8}
    ),
    "sdpo": Kind(f"{_EXPERIMENTAL}sdpo", "SDPO", "prompts", _ROLLOUTS, rewards=True),
    "tpo": Kind(f"{_EXPERIMENTAL}tpo", "TPO", "triples", {"per_device_train_batch_size": 4}),
}
_COMMON: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "optim": "sgd",  # in proportion to the gradient: Adam's steps would be of the sign of rounding
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "seed": 11,
}


def build(combination: Combination, folder: Path, **arguments: Any) -> Any:
    """The trainer of a row, ready to train."""
    kind = KINDS[combination.trainer]
    module = importlib.import_module(kind.module)
    config_class, trainer_class = getattr(module, f"{kind.name}Config"), getattr(module, f"{kind.name}Trainer")
    options = {**_COMMON, **kind.options, **combination.options}
    if combination.ranks is not None:
        options |= {"ddp_backend": "gloo"}
    if kind.rewards:
        arguments["reward_funcs"] = reward
    if combination.peft is not None:
        arguments["peft_config"] = importlib.import_module("peft").LoraConfig(**combination.peft)
    trainer = trainer_class(
        model=model(combination.model, folder),
        args=config_class(output_dir=str(folder / "out"), **options),
        processing_class=tokenizer(),
        train_dataset=_dataset(kind.data),
        **arguments,
    )
    trainer.remove_callback(importlib.import_module("transformers").PrinterCallback)
    return trainer


#: What is logged of time, and not of training.
_CLOCK = ("time", "runtime", "per_second", "tps", "mfu", "fastreward/", "memory", "flos")


def outcome(trainer: Any) -> dict[str, Any]:
    """What a trained trainer can be compared by: each number that was logged, step by step, and the weights."""
    logs = [
        {k: v for k, v in entry.items() if isinstance(v, int | float) and not any(word in k for word in _CLOCK)}
        for entry in trainer.state.log_history
    ]
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    return {"logs": logs, "weights": [_whole(p) for p in unwrapped.parameters()]}


def _whole(parameter: Tensor) -> Tensor:
    x = parameter.detach()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).float().clone()


@contextlib.contextmanager
def _sharded(trainer: Any) -> Iterator[None]:
    """FSDP2 on the CPU, which accelerate can do and does not choose: there it takes DDP whatever is asked for."""
    accelerate = importlib.import_module("accelerate")
    state, utils = trainer.accelerator.state, accelerate.utils
    plugin = utils.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    before, state.distributed_type, state.fsdp_plugin = state.distributed_type, utils.DistributedType.FSDP, plugin
    trainer.is_fsdp_enabled = True
    try:
        yield
    finally:
        state.distributed_type, state.fsdp_plugin = before, None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what trainers print."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def run(combination: Combination, folder: Path) -> dict[str, Any]:
    """One side of a row, in this process."""
    with quiet():
        trainer = build(combination, folder)
        with _sharded(trainer) if combination.ranks == "fsdp2" else contextlib.nullcontext():
            trainer.train()
    if combination.ranks == "fsdp2":
        assert any(hasattr(p, "full_tensor") for p in trainer.model.parameters()), "nothing was sharded"
    found = outcome(trainer)
    assert len([entry for entry in found["logs"] if "loss" in entry]) >= 2, "nothing was logged"
    return found


def _at_work(combination: Combination) -> Iterator[str]:
    """What must have been called: of TRL 1.14 the head only with Liger, else what takes logits, and nothing for SFT."""
    of_logits = supported_version()[1].pair and not combination.options.get("use_liger_kernel")
    for name in combination.served:
        if not (of_logits and name == HEAD):
            yield name
        elif combination.trainer != "sft":
            yield BOTH


def both_sides(combination: Combination, folder: Path, side: Callable[[Combination, Path], Any] = run) -> Any:
    """(stock, patched) of a row, after a check that the replaced functions were at work."""
    from fastreward import patch

    patch.undo()
    stock = side(combination, folder)
    report = patch.trl(**combination.patch)
    try:
        patched = side(combination, folder)
        for name in _at_work(combination):
            calls = sum(usage.calls for target, usage in report.usage.items() if target.endswith(f".{name}"))
            assert calls > 0, f"{combination.name}: {name} was not called; {report.usage}"
    finally:
        patch.undo()
    return stock, patched


def difference(combination: Combination, stock: dict[str, Any], patched: dict[str, Any]) -> float:
    """The largest |patched - stock| / max(1, |stock|) over all that was logged and all weights."""
    assert len(stock["logs"]) == len(patched["logs"])
    worst = 0.0
    for theirs, ours in zip(stock["logs"], patched["logs"], strict=True):
        assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
        for name, value in theirs.items():
            if name in combination.jumping or (math.isnan(value) and math.isnan(ours[name])):
                continue
            worst = max(worst, abs(ours[name] - value) / max(1.0, abs(value)))
    for a, b in zip(stock["weights"], patched["weights"], strict=True):
        worst = max(worst, float(((b - a).abs() / a.abs().clamp(min=1.0)).max()) if a.numel() else 0.0)
    return worst
