"""What the demo and the TRL tests share: model, tokenizer, a reasoning-gym task, a warm-up, a trainer that records.

Everything is made here: no hub, no download. The tokenizer fills any vocabulary size with pieces that decode to text,
because a random policy over a large vocabulary samples mostly ids that a small tokenizer would decode to nothing, and
then every reward is equal.
"""

from __future__ import annotations

import itertools
import string
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

#: The vocabulary of Qwen2 and Qwen2.5 models.
QWEN_VOCABULARY = 151_936
PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"

_INSTRUCTION = "Spell this word backward (example: sun -> nus):"
_ONSETS = (
    "b",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
)
_RIMES = ("a", "an", "ar", "e", "en", "er", "i", "in", "is", "o", "on", "or", "u", "un")


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def build_tokenizer(vocab_size: int = QWEN_VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with exactly `vocab_size` ids, each decoding to its own text.

    There are no merges: a piece that is in the vocabulary is one token, any other is spelled. So the words
    of the task's instruction are one token each and its answers are spelled.
    """
    pieces = dict.fromkeys(itertools.islice(_pieces(), 2 * vocab_size))
    vocabulary = {piece: i for i, piece in enumerate(itertools.islice(pieces, vocab_size))}
    if len(vocabulary) != vocab_size:
        raise ValueError(f"only {len(vocabulary)} pieces can be generated, {vocab_size} asked for")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, padding_side="left"
    )


def _pieces() -> Iterator[str]:
    """Vocabulary entries in the byte-level alphabet, most needed first (`Ġ` is a space, `Ċ` a line break)."""
    yield from (PAD, END, UNKNOWN, "Ġ", "Ċ")
    yield from string.ascii_letters + string.digits + string.punctuation
    for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(_INSTRUCTION):
        yield word
    for number in range(10, 1000):
        yield from (str(number), f"Ġ{number}")
    syllables = ["".join(pair) for pair in itertools.product(_ONSETS, _RIMES)]
    # Capitalised, so that no generated piece is a word of the task: those stay spelled.
    for word in itertools.chain(
        itertools.product(syllables, repeat=2), itertools.product(syllables, syllables[:16], _RIMES)
    ):
        text = "".join(word).capitalize()
        yield from (text, f"Ġ{text}")


# ---- task ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """reasoning-gym's `spell_backward`: prompts, answers and its own score (1 = right, less for letters in place)."""

    entries: Sequence[dict[str, Any]]
    score: Callable[[str, dict[str, Any]], float]

    @classmethod
    def create(cls, size: int, *, seed: int = 0, min_length: int = 3, max_length: int = 10) -> Task:
        """`size` words of `min_length` to `max_length` letters."""
        data = reasoning_gym.create_dataset(
            "spell_backward", seed=seed, size=size, min_word_len=min_length, max_word_len=max_length
        )
        return cls([data[i] for i in range(size)], data.score_answer)

    @staticmethod
    def prompt(entry: dict[str, Any]) -> str:
        """The question as the model sees it."""
        return f"{entry['question']}\n"

    def dataset(self) -> Dataset:
        """Columns `prompt` and `index`, as the trainers want them."""
        return Dataset.from_list([{"prompt": self.prompt(e), "index": i} for i, e in enumerate(self.entries)])

    def reward(self, completions: list[str], index: list[int], **_: Any) -> list[float]:
        """reasoning-gym's score plus up to 0.2 for letters that belong to the word and 0.1 for the right length."""
        return [self._reward(text, self.entries[i]) for text, i in zip(completions, index, strict=True)]

    def _reward(self, completion: str, entry: dict[str, Any]) -> float:
        answer = entry["answer"]
        letters = sum(letter in answer for letter in completion) / max(len(completion), len(answer))
        return float(self.score(completion, entry)) + 0.2 * letters + 0.1 * (len(completion) == len(answer))


# ---- model -----------------------------------------------------------------------------------------------------------


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int = 128, layers: int = 2, tied: bool = True, seed: int = 0
) -> Qwen2ForCausalLM:
    """A Qwen2 model with random f32 weights and the tokenizer's vocabulary."""
    set_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype=torch.float32,
    )
    return Qwen2ForCausalLM(config)


def warm_up(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    *,
    steps: int,
    batch: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Iterator[float]:
    """Teach the answers by teacher forcing; yields the loss of each step. Plain torch, neither side compared."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(task.entries), (batch,), generator=generator).tolist()
        tokens, attention, labels = _teacher_batch(tokenizer, task, [task.entries[i] for i in chosen])
        hidden = model.model(input_ids=tokens, attention_mask=attention).last_hidden_state[:, :-1]
        counted = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), labels[:, 1:][counted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def _teacher_batch(
    tokenizer: PreTrainedTokenizerFast, task: Task, entries: Iterable[dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left-padded tokens [B, T], attention mask [B, T] and labels [B, T] (-100 outside the answer)."""
    prompts, answers = [], []
    for entry in entries:
        prompts.append(tokenizer(task.prompt(entry))["input_ids"])
        answers.append([*tokenizer(entry["answer"])["input_ids"], tokenizer.eos_token_id])
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.full((len(prompts), width), tokenizer.pad_token_id)
    attention = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, width - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        attention[row, width - len(prompt) - len(answer) :] = 1
        labels[row, width - len(answer) :] = torch.tensor(answer)
    return tokens, attention, labels


# ---- trainer ---------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What one optimizer step did and cost."""

    loss: float
    completions: list[list[int]]
    seconds: float = 0.0
    scoring_seconds: float = (
        0.0  # policy and reference log-probs, loss, backward (the model's own part of them included)
    )
    scoring_peak_bytes: int = 0  # growth of the resident set above its level when scoring began
    metrics: dict[str, float] = field(default_factory=dict)


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Times whole steps and collects what the trainer logs about each."""

    def __init__(self, steps: list[Step], on_step: Callable[[Step], None] | None) -> None:
        self.steps, self.on_step = steps, on_step

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps[-1].seconds = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "grad_norm" in logs:
            self.steps[-1].metrics = {k: float(v) for k, v in logs.items() if isinstance(v, int | float)}
            if self.on_step is not None:
                self.on_step(self.steps[-1])


class _Recording:
    """Mixin for TRL's trainers: one `Step` per training step, with a timer around scoring, loss and backward."""

    steps: list[Step]
    _seconds = 0.0
    _peak = 0
    _started: tuple[float, int] | None = None

    def _start(self) -> None:
        self._started = (time.perf_counter(), reset_peak_memory())

    def _stop(self) -> None:
        assert self._started is not None
        self._seconds += time.perf_counter() - self._started[0]
        self._peak = max(self._peak, peak_memory() - self._started[1])
        self._started = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._started is not None:  # the policy's, inside the loss
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        self._start()
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        self._stop()
        return result

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._start()
        self._completions = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
        ]
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._stop()
        step = Step(loss.item(), self._completions, scoring_seconds=self._seconds, scoring_peak_bytes=self._peak)
        self.steps.append(step)
        self._seconds, self._peak = 0.0, 0
        return loss


class RecordingGRPO(_Recording, GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer that fills `steps`."""


class RecordingRLOO(_Recording, RLOOTrainer):  # type: ignore[misc]
    """RLOOTrainer that fills `steps`."""


def train(
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    *,
    method: str = "grpo",
    steps: int,
    prompts: int = 4,
    generations: int = 8,
    max_completion: int = 16,
    on_step: Callable[[Step], None] | None = None,
    reference: Path | None = None,
    save_to: Path | None = None,
    **options: Any,
) -> list[Step]:
    """Train the model saved in `checkpoint` with TRL on the CPU; one `Step` per optimizer step.

    With a KL term TRL loads its reference model from `reference` (default: the same place). `save_to` keeps the trained
    weights.
    """
    config_class, trainer_class = (GRPOConfig, RecordingGRPO) if method == "grpo" else (RLOOConfig, RecordingRLOO)
    config = config_class(
        output_dir=str(checkpoint / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=prompts * generations,
        num_generations=generations,
        max_completion_length=max_completion,
        **(
            {
                "learning_rate": 1e-4,
                "lr_scheduler_type": "constant",
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "dataloader_pin_memory": False,
            }
            | options
        ),
    )
    model = Qwen2ForCausalLM.from_pretrained(checkpoint)
    model.config._name_or_path = str(reference or checkpoint)
    recorded: list[Step] = []
    trainer = trainer_class(
        model=model,
        args=config,
        processing_class=tokenizer,
        reward_funcs=task.reward,
        train_dataset=task.dataset(),
        callbacks=[_Recorder(recorded, on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.steps = recorded
    trainer.train()
    if save_to is not None:
        trainer.model.save_pretrained(save_to)
    return recorded


# ---- memory ----------------------------------------------------------------------------------------------------------


def reset_peak_memory() -> int:
    """Reset the kernel's high-water mark of this process's resident set; returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory() -> int:
    """The largest resident set, in bytes, since `reset_peak_memory`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory needs Linux")
