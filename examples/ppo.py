"""PPO with a critic: rewards per token, GAE, the policy's loss and the critic's: `python examples/ppo.py`.

A small recurrent policy has to write the digits that belong to a prompt, and to stop behind them. It hears one score at
the end of a response: how much of it is right. Everything from there to the optimizer:

    rewards = token_rewards(scores, mask, logprobs=old, ref_logprobs=reference, kl_coef=0.01)
    advantages, returns = gae(rewards, values, mask, lam=0.95, whiten=True)
    loss = policy_loss(logprobs, old, advantages, mask).loss + 0.5 * value_loss(now, values, returns, mask).loss

The critic is a second head of the policy, the reference the policy as it was at first. Fifteen seconds on the CPU.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Annotated

import rich
import torch
import typer
from rich.table import Table
from torch import Tensor

import fastreward as fr

PROMPTS, DIGITS, LIMIT = 16, 10, 6  # answers have two to five digits, responses no more tokens than LIMIT
STOP, BEGIN = DIGITS, DIGITS + 1


# ----------------------------------------------------------------------------------------------------------- the policy
class ActorCritic(torch.nn.Module):
    """What to write next and what the response will be worth, from the prompt and the tokens so far."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.prompts = torch.nn.Embedding(PROMPTS, hidden)
        self.tokens = torch.nn.Embedding(BEGIN + 1, hidden)
        self.gru = torch.nn.GRU(hidden, hidden, batch_first=True)
        self.actor = torch.nn.Linear(hidden, STOP + 1)
        self.critic = torch.nn.Linear(hidden, 1)

    def forward(self, prompts: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [B], responses [B, T] -> logits [B, T, V] and values [B, T], both of the state before a token."""
        before = torch.nn.functional.pad(responses[:, :-1], (1, 0), value=BEGIN)
        states, _ = self.gru(self.tokens(before), self.prompts(prompts).unsqueeze(0))
        return self.actor(states), self.critic(states).squeeze(-1)

    @torch.no_grad()
    def sample(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Responses [B, T] and their mask, 1 up to the first STOP."""
        token, state, written = torch.full_like(prompts, BEGIN), self.prompts(prompts).unsqueeze(0), []
        for _ in range(LIMIT):
            states, state = self.gru(self.tokens(token).unsqueeze(1), state)
            token = torch.multinomial(self.actor(states[:, 0]).softmax(-1), 1).squeeze(-1)
            written.append(token)
        responses = torch.stack(written, 1)
        stopped = (responses == STOP).cumsum(-1)
        return responses, (stopped - (responses == STOP).long()) == 0


def logprobs_of(policy: ActorCritic, prompts: Tensor, responses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs [B, T] of the responses, and the critic's values."""
    logits, values = policy(prompts, responses)
    return fr.token_logprobs(logits, responses, mask=mask).logprobs, values


# ------------------------------------------------------------------------------------------------------------- the task
def answers() -> Tensor:
    """[PROMPTS, LIMIT]: two to five digits, then STOP."""
    digits = torch.randint(DIGITS, (PROMPTS, LIMIT))
    return torch.where(torch.arange(LIMIT) < torch.randint(2, LIMIT, (PROMPTS, 1)), digits, STOP)


def score(responses: Tensor, mask: Tensor, right: Tensor) -> Tensor:
    """[B]: tokens that are right, STOP too, as a share of the longer of response and answer."""
    length = (right != STOP).sum(-1) + 1
    return ((responses == right) & mask & (torch.arange(LIMIT) < length.unsqueeze(-1))).sum(-1) / torch.maximum(
        length, mask.sum(-1)
    )


# ------------------------------------------------------------------------------------------------------------- training
@dataclass
class Step:
    """One round of rollouts, and the last epoch on it."""

    score: float
    right: float  # the share of responses that are all right
    kl: float  # to the reference, in nats a token
    value_loss: float
    explained_variance: float
    clipped: float  # the share of tokens at which the ratio was clipped


def train(steps: int, batch: int, epochs: int, kl_coef: float, seed: int = 0) -> list[Step]:
    """A `Step` for each round of rollouts."""
    torch.manual_seed(seed)
    targets, policy = answers(), ActorCritic()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    done = []
    for _ in range(steps):
        prompts = torch.randint(PROMPTS, (batch,))
        responses, mask = policy.sample(prompts)
        scores = score(responses, mask, targets[prompts])
        with torch.no_grad():
            old, values = logprobs_of(policy, prompts, responses, mask)
            fixed, _ = logprobs_of(reference, prompts, responses, mask)
        rewards = fr.token_rewards(scores, mask, logprobs=old, ref_logprobs=fixed, kl_coef=kl_coef)
        advantages, returns = fr.gae(rewards, values, mask, lam=0.95, whiten=True)
        for _ in range(epochs):
            logprobs, now = logprobs_of(policy, prompts, responses, mask)
            actor = fr.policy_loss(logprobs, old, advantages, mask, ref_logprobs=fixed)
            critic = fr.value_loss(now, values, returns, mask, explained_variance=True)
            optimizer.zero_grad()
            (actor.loss + 0.5 * critic.loss).backward()
            optimizer.step()
        of_actor, of_critic = actor.metrics.floats(), critic.metrics.floats()
        done.append(
            Step(
                float(scores.mean()),
                float((scores == 1).float().mean()),
                of_actor["kl_ref_k1"],
                float(critic.loss.detach()),
                of_critic["explained_variance"],
                of_actor["clip_fraction_low"] + of_actor["clip_fraction_high"],
            )
        )
    return done


def show(steps: list[Step]) -> None:
    """A line for every few rounds."""
    table = Table("rounds", "score", "all right", "KL", "value loss", "explained", "clipped", title="PPO with a critic")
    every = max(1, len(steps) // 10)
    for begin in range(0, len(steps), every):
        part = steps[begin : begin + every]
        score, right, kl, value_loss, explained, clipped = (
            sum(getattr(s, name) for s in part) / len(part) for name in Step.__dataclass_fields__
        )
        table.add_row(
            f"{begin + 1}-{begin + len(part)}",
            f"{score:.3f}",
            f"{right:.0%}",
            f"{kl:.2f}",
            f"{value_loss:.4f}",
            f"{explained:.2f}",
            f"{clipped:.1%}",
        )
    rich.print(table)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Rounds of rollouts.")] = 120,
    batch: Annotated[int, typer.Option(min=2, help="Rollouts of a round.")] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="Optimizer steps on a round.")] = 4,
    kl_coef: Annotated[float, typer.Option(help="The price of a nat away from the reference.")] = 0.01,
) -> None:
    """Train, and show how the scores rise."""
    torch.set_num_threads(1)  # a model as small as this is no work for two
    started = time.perf_counter()
    show(train(steps, batch, epochs, kl_coef))
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    typer.run(main)
