"""A vocabulary in one process, and split over two: token_logprobs of both halves, 12 bytes a token crossing (gloo).

Two processes of one thread each, beside one process on one thread and on two: how much there is to be gained at all is
a matter of the memory's bandwidth. With entropy 16 bytes cross.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import lru_cache, partial

import torch
import torch.distributed as dist

from fastreward.bench import roofline
from fastreward.bench.case import OURS, Case, Contender, Target
from fastreward.bench.cases._steps import Tensors, worst_of_rows
from fastreward.logprobs import token_logprobs
from fastreward.reference import logprobs as reference
from fastreward.verify.error import sampled_rows

CASES = ("forward", "forward+entropy")
DTYPES = ("float32", "bfloat16")
SHAPE = (2048, 151_936)
QUICK = (64, 8192)

_OUTPUTS: dict[str, tuple[str, ...]] = {"forward": ("logprobs",), "forward+entropy": ("logprobs", "entropy")}
_ALONE = {f"{OURS}, one process, one thread": 1, f"{OURS}, one process, two threads": 2}
_PROGRAM = "import sys; from fastreward.bench.cases import ranks; ranks.serve(*sys.argv[1:])"


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """All of the logits [N, V] here, and half of them here and half in a second process."""
    if device != "cpu":
        raise ValueError("bench ranks: two processes on the CPU, by gloo; expected device cpu")
    rows, vocab = shape
    logits, labels = _data(dtype, (rows, vocab))
    outputs = _OUTPUTS[case]
    sampled = sampled_rows(rows, logits.device)
    truth = reference.token_logprobs(logits[sampled].double(), labels[sampled])
    own = logits[:, : vocab // 2]

    def prepare() -> None:
        torch.set_num_threads(1)
        _partner_of(dtype, (rows, vocab))

    def together() -> Tensors:
        _partner_of(dtype, (rows, vocab)).begin(case)
        return tuple(token_logprobs(own, labels, outputs=outputs, process_group=dist.group.WORLD))

    def alone() -> Tensors:
        return tuple(token_logprobs(logits, labels, outputs=outputs))

    return Case(
        operation="ranks",
        name=case,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traffic=roofline.logprobs_forward(rows, vocab, logits.element_size(), len(outputs)),
        error=partial(worst_of_rows, (sampled, tuple(truth[name] for name in outputs)), False),
        contenders=[
            Contender(OURS, together, prepare),
            *(Contender(name, alone, partial(torch.set_num_threads, count)) for name, count in _ALONE.items()),
        ],
        tolerance=1e-5,
        inputs=[logits, labels],
        targets=(Target("ratio", 1.25, list(_ALONE)[1]),),  # one thread alone may take most of the bandwidth
    )


@lru_cache(maxsize=1)
def _data(dtype: torch.dtype, shape: tuple[int, int], first: int = 0) -> Tensors:
    """logits [N, V], of them the columns from `first` on, and labels [N]: the same in every process."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty((shape[0], shape[1] - first), dtype=dtype)
    for start in range(0, shape[0], 64):
        rows = logits[start : start + 64]
        rows.copy_(torch.randn((len(rows), shape[1]), generator=generator)[:, first:] * 2)
    return logits, torch.randint(0, shape[1], shape[:1], generator=generator)


# ------------------------------------------------------------------------------------------------ the second process
class _Partner:
    """Rank 1, told by a line on its input that a call begins; it ends with its input."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        self.key, self.folder = (dtype, shape), tempfile.TemporaryDirectory()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        arguments = (self.folder.name, str(dtype).removeprefix("torch."), *map(str, shape))
        self.process = subprocess.Popen([sys.executable, "-c", _PROGRAM, *arguments], stdin=subprocess.PIPE)
        _join(self.folder.name, 0)

    def begin(self, case: str) -> None:
        """Its part of a call."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case}\n".encode())
        self.process.stdin.flush()

    def end(self) -> None:
        """No more calls."""
        dist.destroy_process_group()
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


_partners: list[_Partner] = []  # one at most


def _partner_of(dtype: torch.dtype, shape: tuple[int, int]) -> _Partner:
    """That for logits of this kind; the one before it ends."""
    if not _partners or _partners[0].key != (dtype, shape):
        while _partners:
            _partners.pop().end()
        _partners.append(_Partner(dtype, shape))
    return _partners[0]


def serve(folder: str, dtype: str, rows: str, vocab: str) -> None:
    """What rank 1 runs: its half of each call."""
    torch.set_num_threads(1)
    own, labels = _data(getattr(torch, dtype), (int(rows), int(vocab)), int(vocab) // 2)
    _join(folder, 1)
    for line in sys.stdin:
        token_logprobs(own, labels, outputs=_OUTPUTS[line.strip()], process_group=dist.group.WORLD)


def _join(folder: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
