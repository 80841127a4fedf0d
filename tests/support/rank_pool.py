"""Processes that are the ranks of gloo groups: started once, then told by the tests which functions to call.

A rank that does not answer in time ends the pool with an error, so that nothing hangs.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

MOST = 3  # ranks of the largest group; the groups of fewer are of the first ones
PATIENCE = 180.0  # seconds, of which a start on a busy machine takes some


class Answer(NamedTuple):
    """What a rank has to say: a result, or the error's type and text."""

    result: Any
    error: str | None


class RankPool:
    """MOST processes, and groups of 1 to MOST of them."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        """The processes; they need a few seconds, in which nobody has to wait for them."""
        self.folder = tempfile.TemporaryDirectory()
        context = get_context("forkserver")  # what they import is imported once
        context.set_forkserver_preload(["fastreward"])
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.folder.name, theirs, sys.path), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def stop(self) -> None:
        """Ends all."""
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()
        self.connections, self.processes = [], []
        self.folder.cleanup()

    def ask(self, function: Callable[..., Any], arguments: Sequence[dict[str, Any]]) -> list[Answer]:
        """function(group, **arguments[rank]) on each of len(arguments) ranks; the function is found by its name."""
        if not self.processes:
            self.start()
        path = f"{function.__module__}:{function.__qualname__}"
        for connection, own in zip(self.connections, arguments, strict=False):
            connection.send_bytes(_packed((path, len(arguments), own)))
        end, answers = time.monotonic() + PATIENCE, []
        for rank, connection in enumerate(self.connections[: len(arguments)]):
            if not connection.poll(max(0.0, end - time.monotonic())):
                self.stop()
                raise TimeoutError(f"rank {rank} of {len(arguments)} did not answer {path}")
            answers.append(Answer(*_unpacked(connection.recv_bytes())))
        return answers

    def run(self, function: Callable[..., Any], arguments: Sequence[dict[str, Any]]) -> list[Any]:
        """The results of `ask`; raises where a rank raised."""
        answers = self.ask(function, arguments)
        for rank, answer in enumerate(answers):
            if answer.error is not None:
                raise RuntimeError(f"rank {rank}: {answer.error}")
        return [answer.result for answer in answers]


def serve(rank: int, folder: str, connection: Connection, paths: list[str]) -> None:
    """What each process does until it is ended."""
    sys.path[:] = paths
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = f"file://{Path(folder, 'rendezvous')}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=MOST)
    groups = [dist.new_group(list(range(count))) for count in range(1, MOST + 1)]
    while True:
        path, count, arguments = _unpacked(connection.recv_bytes())
        try:
            module, _, name = path.partition(":")
            function = getattr(importlib.import_module(module), name)
            answer = function(groups[count - 1], **arguments), None
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            answer = None, f"{type(error).__name__}: {error}"
        connection.send_bytes(_packed(answer))


def _packed(x: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


def _unpacked(x: bytes) -> Any:
    return torch.load(io.BytesIO(x), weights_only=False)
