"""A program for tests/operations/test_threads.py: calls on two threads, then the same calls in the child of a fork.

    python threads_in_children.py fork | multiprocessing | mid-call | loader

It ends with the word "equal" where every child has had the parent's bits. Arrays are NumPy's wherever torch would use
threads of its own: those hang in a child.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

import numpy as np
import torch

import fastreward as fr
from fastreward import _core

Results = dict[str, np.ndarray]
_RANDOM = np.random.default_rng(0)


def _normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(_RANDOM.standard_normal(shape, dtype=np.float32))


_X, _OLD, _ADVANTAGES = (_normal(24, 1000) for _ in range(3))
_MASK = torch.from_numpy(_RANDOM.random((24, 1000)) < 0.8)
_LOGITS, _LABELS = _normal(32, 900), torch.from_numpy(_RANDOM.integers(0, 900, 32))
_TOKENS = torch.from_numpy(_RANDOM.integers(0, 2, (24, 1000)))


def results() -> Results:
    """What several operations give, forward and backward."""
    logprobs = _X.clone().requires_grad_()
    loss = fr.policy_loss(logprobs, _OLD, _ADVANTAGES, _MASK)
    loss.loss.backward()
    tree = fr.PrefixTree(_TOKENS, group_size=4)
    tensors = {
        "whiten": fr.whiten(_X, _MASK),
        "loss": loss.loss.detach(),
        "gradient": logprobs.grad,
        "logprobs": fr.token_logprobs(_LOGITS, _LABELS).logprobs,
        "group": fr.group_advantages(_X.reshape(-1), group_size=8),
        "tree": tree.edge_start,
        "credit": tree.to_tokens(tree.aggregate(_ADVANTAGES[:, 0].contiguous())),
    }
    return {name: x.numpy() for name, x in tensors.items() if x is not None}


def _differing(expected: Results) -> int:
    """How many results are not the expected ones."""
    got = results()
    return sum(not np.array_equal(got[name], expected[name]) for name in expected)


def _forked(expected: Results) -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs is ended
        os._exit(_differing(expected))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def fork(expected: Results) -> None:
    """Again and again, and in a child of a child."""
    for _ in range(3):
        _forked(expected)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        _forked(expected)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def mid_call(expected: Results) -> None:
    """While another thread of the parent is in the middle of calls."""
    stop = threading.Event()

    def calls() -> None:
        while not stop.is_set():
            fr.whiten(_X, _MASK)

    other = threading.Thread(target=calls)
    other.start()
    try:
        for _ in range(10):
            _forked(expected)
    finally:
        stop.set()
        other.join()
    assert _differing(expected) == 0


def multiprocessing_(expected: Results) -> None:
    """A pool of workers."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_differing, [expected] * 4).get(timeout=60) == [0] * 4


class _Dataset(torch.utils.data.Dataset[int]):
    def __init__(self, expected: Results) -> None:
        self.expected = expected

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        torch.set_num_threads(2)  # a loader's worker begins with one
        return _differing(self.expected)


def loader(expected: Results) -> None:
    """In the workers of a DataLoader."""
    batches = torch.utils.data.DataLoader(_Dataset(expected), num_workers=2, multiprocessing_context="fork", timeout=60)
    assert [int(x) for x in batches] == [0] * 4


if __name__ == "__main__":
    torch.set_num_threads(2)
    _core.set_worth_waking(0)
    before = results()
    {"fork": fork, "mid-call": mid_call, "multiprocessing": multiprocessing_, "loader": loader}[sys.argv[1]](before)
    assert _differing(before) == 0
    sys.stdout.write("equal\n")
