"""The CPU's threads (csrc/cpu/threads.hpp) from Python: bits for any number of them, several callers, and children.

What the pool itself promises, with workers that come late or never, is in tests/backends/cpu/core/threads_tests.cpp.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from checkout import ROOT
from torch import Tensor

import fastreward as fr
from fastreward import losses

Operation = Callable[[], list[Tensor]]


def _operations() -> dict[str, Operation]:
    """Every operation with threads, at sizes that are cut into several chunks; each gives its results and gradients."""
    rows, length, vocabulary = 40, 1500, 700
    x, old, advantages = torch.randn(rows, length), torch.randn(rows, length), torch.randn(rows, length)
    mask = torch.rand(rows, length) < 0.8
    bounds = torch.tensor([0, 7, 7, 20_000, 20_001, 45_000])
    logits, labels = torch.randn(48, vocabulary), torch.randint(vocabulary, (48,))
    long_logits, long_labels = torch.randn(2, 40_000), torch.randint(40_000, (2,))
    rewards, ids = torch.randn(20_000), torch.randint(3000, (20_000,))
    tokens = torch.randint(2, (rows, length))

    def loss(loss: losses.Loss, **options: Tensor) -> list[Tensor]:
        packed = "cu_seqlens" in options
        given = [t.reshape(-1)[:45_000] if packed else t for t in (x, old, advantages, mask)]
        leaf = given[0].clone().requires_grad_()
        result = fr.policy_loss(leaf, given[1], given[2], given[3], loss=loss, **options)
        (result.loss * 3).backward()  # an upstream gradient other than 1: scaled by a kernel of its own
        assert leaf.grad is not None
        return [result.loss.detach(), leaf.grad]

    def values() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        result = fr.value_loss(leaf, old, advantages, mask)
        result.loss.backward()
        assert leaf.grad is not None
        return [result.loss.detach(), result.metrics.values_tensor, leaf.grad]

    def divergence() -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        found = fr.token_divergence(leaf, logits.flip(0), divergence="jsd", outputs=("entropy",))
        assert found.entropy is not None
        (found.divergence.sum() + found.entropy.sum()).backward()
        assert leaf.grad is not None
        return [found.divergence.detach(), found.entropy.detach(), leaf.grad]

    def logprobs(logits: Tensor, labels: Tensor) -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        stats = fr.token_logprobs(leaf, labels, outputs=("logprobs", "entropy", "rank"))
        assert stats.entropy is not None
        assert stats.rank is not None
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
        assert leaf.grad is not None
        return [stats.logprobs.detach(), stats.entropy.detach(), stats.rank, leaf.grad]

    def segments() -> list[Tensor]:
        turns = fr.segment_ids(mask)
        leaf = x.clone().requires_grad_()
        means = fr.segment_reduce(leaf, turns, op="softmin", temperature=0.5)
        (grad,) = torch.autograd.grad(means.sum(), leaf)
        return [turns, means.detach(), grad, fr.scatter_rewards(means.detach(), turns, place="end")]

    def kept() -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        keep = torch.cat([labels.unsqueeze(1), (labels.unsqueeze(1) + torch.arange(1, 9)) % vocabulary], 1)
        fr.token_logprobs(leaf, labels, kept_tokens=keep).logprobs.sum().backward()
        assert leaf.grad is not None
        return [leaf.grad]

    def id_logprobs() -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        found = fr.token_logprobs(
            leaf, labels, outputs=("id_logprobs",), token_ids=torch.tensor([5, 9, 600])
        ).id_logprobs
        assert found is not None
        (found * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
        assert leaf.grad is not None
        return [found.detach(), leaf.grad]

    def logits_loss() -> list[Tensor]:
        leaf = logits.view(4, 12, -1).clone().requires_grad_()
        result = fr.logits_policy_loss(
            leaf, labels.view(4, 12), old[:4, :12].contiguous(), advantages[:4, 0].contiguous()
        )
        result.loss.backward()
        assert leaf.grad is not None
        return [result.loss.detach(), leaf.grad]

    def tree() -> list[Tensor]:
        tree = fr.PrefixTree(tokens, mask, group_size=4)
        values = tree.aggregate(advantages[:, 0].contiguous())
        packed = tree.pack()
        return [
            tree.edge_start,
            tree.node_of_token,
            values,
            tree.advantages(values, "td"),
            tree.to_tokens(values),
            tree.from_tokens(x),
            packed.token_ids,
            packed.position_ids,
        ]

    return {
        "whiten": lambda: [fr.whiten(x, mask)],
        "value_loss": values,
        "divergence": divergence,
        "rewards": lambda: [
            fr.token_rewards(x[:, 0], mask, logprobs=x, ref_logprobs=old, kl_coef=0.1, kl="k3", place=place)
            for place in ("end", "broadcast")
        ],
        "returns": lambda: [*fr.gae(x, -x, mask, gamma=0.9, lam=0.8)],
        "group": lambda: [fr.group_advantages(rewards, group_size=4)],
        "group ids": lambda: [fr.group_advantages(rewards, ids)],
        "segments": segments,
        "group statistics": lambda: [*fr.group_statistics(rewards, ids, ("mean", "logsumexp", "rank")).values()],
        "policy_loss": lambda: loss(losses.ppo()),
        "policy_loss, sequences": lambda: loss(losses.gspo()),
        "policy_loss, packed": lambda: loss(losses.ppo(), cu_seqlens=bounds),
        "token_logprobs": lambda: logprobs(logits, labels),
        "token_logprobs, few long rows": lambda: logprobs(long_logits, long_labels),
        "token_logprobs, kept ids": kept,
        "token_logprobs, ids": id_logprobs,
        "logits_policy_loss": logits_loss,
        "prefix_tree": tree,
    }


OPERATIONS = tuple(_operations())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", OPERATIONS)
def test_bits_for_any_number_of_threads(name: str) -> None:
    operation = _operations()[name]
    torch.set_num_threads(1)
    expected = operation()
    for count in (2, 3, 8, 2):  # more than before, and fewer again
        torch.set_num_threads(count)
        for _ in range(3):
            for got, want in zip(operation(), expected, strict=True):
                assert torch.equal(got, want)


@pytest.mark.usefixtures("threads")
def test_bits_with_several_callers() -> None:
    torch.set_num_threads(2)
    operations = list(_operations().values())
    expected = [operation() for operation in operations]
    wrong: list[int] = []

    def calls(first: int) -> None:
        torch.set_num_threads(2)  # a new thread has torch's default
        for k in [*range(first, len(operations)), *range(first)]:
            if not all(torch.equal(got, want) for got, want in zip(operations[k](), expected[k], strict=True)):
                wrong.append(k)

    callers = [threading.Thread(target=calls, args=(3 * i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.usefixtures("threads")
def test_denormals_are_the_callers_on_every_thread() -> None:
    """A thread rounds as its caller does: torch.set_flush_denormal is a thread's own."""
    x = torch.full((16, 8192), 1e-40)
    x[:, ::2] = 3.0
    for flush in (True, False):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this CPU can't flush denormals")
        try:
            torch.set_num_threads(1)
            expected = fr.group_advantages(x.reshape(-1), group_size=2, center="none", scale="none")
            torch.set_num_threads(2)
            for _ in range(5):
                got = fr.group_advantages(x.reshape(-1), group_size=2, center="none", scale="none")
                assert torch.equal(got.view(torch.int32), expected.view(torch.int32))
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize("how", ["fork", "mid-call", "multiprocessing", "loader"])
def test_children_go_on(how: str) -> None:
    program = ROOT / "tests" / "support" / "threads_in_children.py"
    done = subprocess.run([sys.executable, program, how], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("equal\n")
