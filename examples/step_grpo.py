"""GRPO with credit for each step, from a toy process reward, in TRL: `python examples/step_grpo.py`.

The trainer is TRL's own, with two methods replaced: one keeps what the process reward says of each step, the other
makes advantages per token of it. They are four public operations in a row: steps end at a separator, later steps count
less, the group's completions are compared step by step, and a step's advantage goes to all of its tokens. Generation,
loss, logging and the rest are TRL's.

A small model learns to go on in the alphabet on the CPU: y= is z;a;b. A step is right if it is the letter after the
one that the model itself wrote before it, so an early mistake is no mistake of the later steps. A few supervised steps
teach the form, no more. Plain GRPO gets the same rewards, added up over a completion, from the same start with the same
seed: it has to find out by itself which of the steps they were for. Under two minutes for both.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise, zip_longest
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated, Any

import rich
import torch
import typer
from rich.table import Table
from torch import Tensor
from trl import GRPOTrainer

import fastreward as fr

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))

SEPARATOR = ";"


# ---------------------------------------------------------------------------------------------------------- the trainer
class StepGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer whose advantages are those of steps, for text models on one process."""

    #: (prompt, completion) -> the score of each step.
    process_reward: Callable[[str, str], list[float]]
    #: How much a step counts for the one before it.
    gamma: float = 0.5

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Tensor:
        scores = [self.process_reward(*pair) for pair in zip(prompts, completions, strict=True)]
        # A step that is missing is a wrong one: it counts in its group, or who stops early would not be compared.
        self._scores = torch.tensor(list(zip_longest(*scores, fillvalue=0.0))).T  # [B, S]
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, ids)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        separator = self.processing_class.convert_tokens_to_ids(SEPARATOR)
        steps = fr.segment_ids(batch["completion_ids"], separators=separator, mask=batch["completion_mask"])  # [B, T]
        returns = fr.discounted_returns(self._scores, gamma=self.gamma)  # [B, S]: from this step on
        size, count = self._scores.shape
        prompt = torch.arange(size) // self.num_generations
        groups = fr.Groups.by(prompt, torch.arange(count).expand(size, count))  # same prompt, same step
        batch["advantages"] = fr.scatter_rewards(fr.group_advantages(returns, groups), steps, place="broadcast")
        return batch


# ------------------------------------------------------------------------------------------------------------- the task
def alphabet(length: int) -> list[dict[str, str]]:
    """Questions such as y= with their answers, z;a;b."""
    letters = 2 * ascii_lowercase
    return [
        {"question": f"{letters[k]}=", "answer": SEPARATOR.join(letters[k + 1 : k + 1 + length])} for k in range(26)
    ]


def step_scores(prompt: str, completion: str, length: int) -> list[float]:
    """1 for each step that is the letter after the one written before, 0 for others, for missing ones, for more."""
    written = completion.split(SEPARATOR)
    right = [a + b in ascii_lowercase + "a" and len(a + b) == 2 for a, b in pairwise((prompt[0], *written))]
    scores = [float(found) for found in right[:length]] + [0.0] * len(right[length:])
    return scores + [0.0] * (length - len(scores))


# ------------------------------------------------------------------------------------------------------------- the runs
def train(
    trainer_class: type[GRPOTrainer], steps: int, prompts: int, generations: int, warm_up: int, length: int
) -> list[float]:
    """A few supervised steps, then GRPO; the mean reward of each step of training."""
    import training
    from transformers import PrinterCallback
    from trl import GRPOConfig

    def process_reward(prompt: str, completion: str) -> list[float]:
        return step_scores(prompt, completion, length)

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [sum(process_reward(*pair)) / length for pair in zip(prompts, completions, strict=True)]

    tokenizer = training.build_tokenizer(200)
    task = training.Task(alphabet(length), lambda *_: 0.0)
    model = training.build_model(tokenizer, hidden=64)
    for _ in training.warm_up(model, tokenizer, task, steps=warm_up):
        pass
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=prompts * generations,
            num_generations=generations,
            max_completion_length=2 * length + 2,
            learning_rate=1.5e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
        )
        trainer = trainer_class(
            model=model,
            args=config,
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=task.dataset(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.process_reward = process_reward
        trainer.train()
    return [log["reward"] for log in trainer.state.log_history if "reward" in log]


def show(curves: dict[str, list[float]]) -> None:
    """A line for every few steps."""
    steps = len(next(iter(curves.values())))
    table = Table("steps", *curves, title="The share of right steps")
    every = max(1, steps // 10)
    for begin in range(0, steps, every):
        parts = [curve[begin : begin + every] for curve in curves.values()]
        table.add_row(f"{begin + 1}-{begin + len(parts[0])}", *(f"{sum(part) / len(part):.3f}" for part in parts))
    rich.print(table)


def main(
    steps: Annotated[int, typer.Option(min=1)] = 60,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step.")] = 16,
    generations: Annotated[int, typer.Option(min=2, help="Completions of a prompt.")] = 8,
    warm_up: Annotated[int, typer.Option(min=1, help="Supervised steps before.")] = 120,
    length: Annotated[int, typer.Option(min=2, help="Steps of a completion.")] = 8,
) -> None:
    """Train twice from the same start, and show the rewards side by side."""
    torch.set_num_threads(1)  # a model as small as this is no work for two
    started = time.perf_counter()
    runs: dict[str, type[GRPOTrainer]] = {"plain GRPO": GRPOTrainer, "credit for steps": StepGRPOTrainer}
    show({name: train(trainer, steps, prompts, generations, warm_up, length) for name, trainer in runs.items()})
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    typer.run(main)
