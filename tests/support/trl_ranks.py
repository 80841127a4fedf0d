"""The rows of `trl_combinations` that need more than one process: `launch` starts the ranks, each runs this file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RANKS = 2


def launch(names: Sequence[str], folder: Path, timeout: float = 540) -> dict[str, float]:
    """The difference of each row, stock beside patched, from two ranks that talk over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    found = folder / "differences.json"
    command = [sys.executable, __file__, str(folder), *names]
    logs = [(folder / f"rank{rank}.txt").open("w") for rank in range(RANKS)]
    ranks = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(RANKS)
    ]
    try:
        codes = [rank.wait(timeout) for rank in ranks]
    finally:
        for rank, log in zip(ranks, logs, strict=True):
            rank.kill()
            log.close()
    if any(codes):
        tails = [Path(log.name).read_text()[-3000:] for log in logs]
        raise AssertionError("\n".join(f"rank {k} left with {code}:\n{tails[k]}" for k, code in enumerate(codes)))
    return dict(json.loads(found.read_text()))


def _rank(folder: Path, names: Sequence[str]) -> None:
    import torch
    from trl_combinations import COMBINATIONS, both_sides, difference

    torch.set_num_threads(1)
    rows = {row.name: row for row in COMBINATIONS}
    found = {}
    for name in names:
        stock, patched = both_sides(rows[name], folder)
        found[name] = difference(rows[name], stock, patched)
        # Each rank has the same weights and has logged the same.
        gathered: list[object] = [None] * RANKS
        torch.distributed.all_gather_object(gathered, patched["weights"])
        for other in gathered:
            assert all(torch.equal(a, b) for a, b in zip(patched["weights"], other, strict=True))  # type: ignore[call-overload]
    if os.environ["RANK"] == "0":
        (folder / "differences.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), sys.argv[2:])
