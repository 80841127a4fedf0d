"""Advantages add up: GRPO plus distillation on the student's own samples: `python examples/compose_advantages.py`.

An advantage is a tensor, so a mix of methods is plain arithmetic, each of them normalised in its own way:

    advantages = lam * group_advantages(rewards).unsqueeze(-1) + (1 - lam) * whiten(recipes.opd(old, teacher))

A small recurrent policy has to write the five tokens that belong to a prompt. A reward says only whether all of them
are right, which a random policy never sees; the teacher knows every token, but is unsure: a third of its responses are
right. Rewards alone teach nothing, the teacher alone takes the student about as far as it is itself, and both together
further. Ten seconds on the CPU.
"""

from __future__ import annotations

from typing import Annotated

import rich
import torch
import typer
from rich.table import Table
from torch import Tensor

import fastreward as fr
from fastreward import recipes

PROMPTS, LENGTH, VOCABULARY = 16, 5, 10
SURE = 0.8  # the teacher's probability of the right token: 0.8 ** 5 is about a third


class Policy(torch.nn.Module):
    """Logits of the next token, from the prompt and the tokens so far."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.prompts = torch.nn.Embedding(PROMPTS, hidden)
        self.tokens = torch.nn.Embedding(VOCABULARY + 1, hidden)  # the last one begins a response
        self.gru = torch.nn.GRU(hidden, hidden, batch_first=True)
        self.head = torch.nn.Linear(hidden, VOCABULARY)

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens so far [B, T] -> logits of each next one [B, T, V], and the state behind them."""
        states, state = self.gru(self.tokens(tokens), state)
        return self.head(states), state

    def start(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """The token that begins a response [B, 1], and the state in front of it."""
        return prompts.new_full((len(prompts), 1), VOCABULARY), self.prompts(prompts).unsqueeze(0)

    def logits(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """[B, T, V]."""
        begin, state = self.start(prompts)
        return self(torch.cat([begin, responses[:, :-1]], 1), state)[0]

    @torch.no_grad()
    def sample(self, prompts: Tensor) -> Tensor:
        """[B, T]."""
        token, state = self.start(prompts)
        response = []
        for _ in range(LENGTH):
            logits, state = self(token, state)
            token = torch.multinomial(logits[:, -1].softmax(-1), 1)
            response.append(token)
        return torch.cat(response, 1)


def teacher_logprobs(answers: Tensor, responses: Tensor) -> Tensor:
    """[B, T]: SURE of the right token, the rest shared by all others."""
    right = torch.tensor(SURE).log()
    wrong = torch.tensor((1 - SURE) / (VOCABULARY - 1)).log()
    return torch.where(responses == answers, right, wrong)


def train(lam: float, steps: int, prompts: int, generations: int, seed: int = 0) -> list[float]:
    """The share of right responses at each step."""
    torch.manual_seed(seed)
    answers = torch.randint(VOCABULARY, (PROMPTS, LENGTH))
    policy, found = Policy(), []
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        prompt = torch.randperm(PROMPTS)[:prompts].repeat_interleave(generations)
        response = policy.sample(prompt)
        rewards = (response == answers[prompt]).all(-1)
        logprobs = fr.token_logprobs(policy.logits(prompt, response), response).logprobs
        old = logprobs.detach()
        credit = fr.group_advantages(rewards, group_size=generations)  # [B]: GRPO's
        distillation = fr.whiten(recipes.opd(old, teacher_logprobs(answers[prompt], response)))  # [B, T]
        advantages = lam * credit.unsqueeze(-1) + (1 - lam) * distillation
        optimizer.zero_grad()
        fr.policy_loss(logprobs, old, advantages).loss.backward()
        optimizer.step()
        found.append(float(rewards.float().mean()))
    return found


def main(
    steps: Annotated[int, typer.Option(min=1)] = 160,
    prompts: Annotated[int, typer.Option(min=1, max=PROMPTS, help="Prompts of a step.")] = 8,
    generations: Annotated[int, typer.Option(min=2, help="Responses to a prompt.")] = 16,
) -> None:
    """Train three times, and show how many responses are right."""
    torch.set_num_threads(1)  # a model as small as this is no work for two
    runs = {"rewards alone": 1.0, "teacher alone": 0.0, "both": 0.7}
    curves = {name: train(lam, steps, prompts, generations) for name, lam in runs.items()}
    table = Table("steps", *runs, title=f"Right responses; the teacher's: {SURE**LENGTH:.0%}")
    every = max(1, steps // 8)
    for begin in range(0, steps, every):
        parts = [curve[begin : begin + every] for curve in curves.values()]
        shares = [f"{sum(part) / len(part):.0%}" for part in parts]
        table.add_row(f"{begin + 1}-{begin + len(parts[0])}", *shares)
    rich.print(table)


if __name__ == "__main__":
    typer.run(main)
