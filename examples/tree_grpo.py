"""GRPO with TEMPO's token-level credit, trained on prefix trees, in TRL: `python examples/tree_grpo.py`.

The trainer is TRL's own, with two methods replaced. Advantages come from the tree of each group's completions, so that
a token gets credit for what it changed (TEMPO, arXiv 2509.18314). And the model reads every shared prefix once: prompts
that are the same for a whole group, and completions as far as they agree. Losses, KL, logging and the rest are TRL's.

A small random model learns to spell words backward on the CPU, in about a minute.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import rich
import torch
import typer
from rich.table import Table
from torch import Tensor
from trl import GRPOTrainer

from fastreward import PrefixTree, recipes

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))


# ---------------------------------------------------------------------------------------------------------- the trainer
class TreeGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer with tree credit and tree-packed forward passes, for text models on one process."""

    #: Unique tokens of one forward pass; a longer batch is cut into several.
    max_tokens: int | None = None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        self._rewards = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        batch["advantages"] = recipes.tempo(
            batch["completion_ids"], batch["completion_mask"], self._rewards, group_size=self.num_generations
        )
        return batch

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,  # [B, T], prompts padded on the left, completions on the right
        attention_mask: Tensor,  # [B, T]
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if compute_aux_loss or any(x is not None for x in images.values()):
            raise NotImplementedError("TreeGRPOTrainer: images and mixtures of experts are not supported")
        completions = attention_mask.clone()
        completions[:, :-logits_to_keep] = 0
        packed = PrefixTree(input_ids, completions, attention_mask=attention_mask).pack(self.max_tokens)
        outputs = ("logprobs", "entropy") if compute_entropy else ("logprobs",)
        logprobs = torch.zeros(input_ids.shape, device=input_ids.device)
        entropy = torch.zeros_like(logprobs)
        for part in packed.bins():
            with self.accelerator.autocast():
                logits = model(
                    input_ids=part.token_ids[None],
                    position_ids=part.position_ids[None],
                    attention_mask=part.attention_mask(),
                ).logits
            stats = part.token_logprobs(logits, temperature=self.temperature, outputs=outputs)
            logprobs = logprobs.index_copy(0, part.rows, part.to_tokens(stats.logprobs))
            if compute_entropy:
                entropy = entropy.index_copy(0, part.rows, part.to_tokens(stats.entropy))
        self.packing = (packed.tokens, len(packed))
        return logprobs[:, -logits_to_keep:], entropy[:, -logits_to_keep:] if compute_entropy else None, None


# ------------------------------------------------------------------------------------------------------ what it records
@dataclass
class Step:
    """One training step: TRL's logs, the tokens of its batch and how many of them are unique, the time of its loss."""

    reward: float
    loss: float
    tokens: int
    unique: int
    seconds: float


class RecordingTrainer(TreeGRPOTrainer):
    """Keeps a `Step` of each step; in the first one, how far the packed log-probs are from TRL's own."""

    steps: list[Step]
    difference: float | None = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self.difference is None:
            with torch.no_grad():
                stock = GRPOTrainer._get_per_token_logps_and_entropies(self, *args, **kwargs)
            valid = found[0] != 0  # TRL's padding is not 0
            self.difference = float((found[0].detach() - stock[0])[valid].abs().max())
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, timed."""
        started = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        rewards = float(self._rewards.mean())
        self.steps.append(Step(rewards, float(loss), *self.packing, time.perf_counter() - started))
        return loss


def train(steps: int, prompts: int, generations: int, warm_up: int, max_tokens: int | None) -> RecordingTrainer:
    """A few supervised steps, so that rewards vary, then GRPO."""
    import training
    from transformers import PrinterCallback
    from trl import GRPOConfig

    tokenizer = training.build_tokenizer(4000)
    task = training.Task.create(512, min_length=4, max_length=7)
    model = training.build_model(tokenizer)
    for _ in training.warm_up(model, tokenizer, task, steps=warm_up):
        pass
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=prompts * generations,
            num_generations=generations,
            max_completion_length=10,
            learning_rate=3e-4,
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
        trainer = RecordingTrainer(
            model=model,
            args=config,
            processing_class=tokenizer,
            reward_funcs=task.reward,
            train_dataset=task.dataset(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.max_tokens, trainer.steps = max_tokens, []
        trainer.train()
    return trainer


def show(trainer: RecordingTrainer) -> None:
    """A line for every few steps."""
    table = Table("step", "reward", "loss", "tokens", "unique", "saved", "seconds", title="GRPO with TEMPO's credit")
    every = max(1, len(trainer.steps) // 10)
    for begin in range(0, len(trainer.steps), every):
        part = trainer.steps[begin : begin + every]
        tokens, unique = sum(s.tokens for s in part), sum(s.unique for s in part)
        table.add_row(
            f"{begin + 1}-{begin + len(part)}",
            f"{sum(s.reward for s in part) / len(part):.3f}",
            f"{sum(s.loss for s in part) / len(part):+.4f}",
            str(tokens // len(part)),
            str(unique // len(part)),
            f"{1 - unique / tokens:.0%}",
            f"{sum(s.seconds for s in part) / len(part):.2f}",
        )
    rich.print(table)
    rich.print(f"largest difference of a log-prob from TRL's own, first step: {trainer.difference:.1e}")


def main(
    steps: Annotated[int, typer.Option(min=1)] = 20,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step.")] = 8,
    generations: Annotated[int, typer.Option(min=2, help="Completions of a prompt.")] = 8,
    warm_up: Annotated[int, typer.Option(min=1, help="Supervised steps before.")] = 100,
    max_tokens: Annotated[int | None, typer.Option(help="Unique tokens of one forward pass.")] = None,
) -> None:
    """Train, and show rewards and the tokens that the trees save."""
    started = time.perf_counter()
    trainer = train(steps, prompts, generations, warm_up, max_tokens)
    show(trainer)
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    typer.run(main)
