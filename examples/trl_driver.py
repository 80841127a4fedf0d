"""What TRL computes beside its model, stock and with `fastreward.patch.trl(losses=True)`: time, memory, equal numbers.

    python examples/trl_driver.py [--json results.json] [--rows 512 4096] [--width 8192] [--vocabulary 151936]

One table from one run. Each row calls one of TRL's own functions forward and backward on the same random tensors,
first as TRL has it, then replaced, and compares results and gradients before any time is taken. No model is run and
nothing is downloaded; `pip install '.[trl]'`. About a minute on two cores; --rows 512 where memory is short.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils as utils
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

import fastreward as fr

Step = Callable[[], list[Tensor]]


@dataclass
class Row:
    """Medians of the whole call, forward and backward; peaks above what the inputs take."""

    function: str
    shape: str
    stock_seconds: float
    patched_seconds: float
    stock_peak_mib: float
    patched_peak_mib: float
    difference: float

    @property
    def ratio(self) -> float:
        """How many times faster."""
        return self.stock_seconds / self.patched_seconds


# -------------------------------------------------------------------------------------------------------- measurement
def peak_of(step: Step) -> float:
    """MiB that the resident set grows by at most."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 2**20


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def seconds_of(step: Step, runs: int) -> float:
    """Median."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def compare(function: str, shape: str, step: Step, runs: int) -> Row:
    """Stock, then patched. The first call of either warms up, and gives what is compared."""
    fr.patch.undo()
    theirs = step()
    stock_peak, stock = peak_of(step), seconds_of(step, runs)
    fr.patch.trl(losses=True)
    ours = step()
    pairs = zip(ours, theirs, strict=True)
    # By the largest value of each tensor: a gradient is small where there are many tokens.
    difference = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)
    del ours, theirs
    patched_peak, patched = peak_of(step), seconds_of(step, runs)
    fr.patch.undo()
    return Row(function, shape, stock, patched, stock_peak, patched_peak, difference)


# ------------------------------------------------------------------------------------------------------------- losses
class OneProcess:
    """What the losses ask of accelerate."""

    num_processes = 1
    sync_gradients = True

    def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
        """Nothing to reduce."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Nothing to gather."""
        return x


OPTIONS: dict[str, Any] = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.04,
    "aux_loss_enabled": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
    "use_adaptive_entropy": False,
    "entropy_coef": 0.0,
    "_entropy_bonus_enabled": False,
    "current_gradient_accumulation_steps": 1,
}
ARGUMENTS: dict[str, Any] = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}


def losses(rows: int, width: int, runs: int) -> Iterator[Row]:
    """GRPO's and RLOO's loss with their metrics, on rollouts [rows, width] of random lengths."""
    old = -torch.rand(rows, width)
    mask = (torch.arange(width) < torch.randint(1, width + 1, (rows, 1))).long()
    logprobs = (old + 0.1 * torch.randn(rows, width)).mul_(mask).requires_grad_()
    entropy, reference = torch.rand(rows, width), old * 1.1
    ids = torch.zeros(rows, 1, dtype=torch.int64).expand(rows, width)
    advantages = torch.randn(rows)
    inputs = {
        **dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids"), ids),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "old_logps": (old * mask).sum(1),
        "num_items_in_batch": mask.sum(),
    }

    def step_of(trainer_class: Any, options: dict[str, Any]) -> Step:
        trainer = types.SimpleNamespace(
            **(OPTIONS | options),
            args=types.SimpleNamespace(**ARGUMENTS),
            accelerator=OneProcess(),
            model=types.SimpleNamespace(training=True),
            max_completion_length=width,
            _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        )

        def step() -> list[Tensor]:
            trainer._metrics = {"train": defaultdict(list)}
            # Looked up at each call: the patch replaces the method.
            loss = trainer_class._compute_loss(trainer, None, {**inputs, "prompt_ids": ids[:, :1]})
            (gradient,) = torch.autograd.grad(loss, logprobs)
            logged = [torch.tensor(values) for values in trainer._metrics["train"].values()]
            return [loss.detach(), gradient, *logged]

        return step

    for name, trainer_class, options in (
        ("GRPO, dapo, with KL", GRPOTrainer, {}),
        ("GRPO, sequence level", GRPOTrainer, {"importance_sampling_level": "sequence", "loss_type": "grpo"}),
        ("RLOO", RLOOTrainer, {}),
    ):
        yield compare(f"loss and metrics: {name}", f"[{rows}, {width}]", step_of(trainer_class, options), runs)


# ---------------------------------------------------------------------------------------------------------- log-probs
def from_hidden_states(tokens: int, hidden: int, vocabulary: int, runs: int) -> Row:
    """Log-probs and entropies through the LM head, with the gradients of both."""
    states = torch.randn(tokens, hidden, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden) / hidden**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    arguments = (states, weight, None, targets, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0)

    def step() -> list[Tensor]:
        logprobs, entropy, *_ = utils._ChunkedLogProbFunction.apply(*arguments, ("log_probs", "entropy"))
        gradients = torch.autograd.grad(logprobs.mean(), (states, weight))
        return [logprobs.detach(), entropy.detach(), *gradients]

    return compare("log-probs from hidden states", f"[{tokens}, {hidden}] x {vocabulary}", step, runs)


def from_logits(tokens: int, vocabulary: int, runs: int) -> Row:
    """Log-probs and entropies of whole logits, with the gradient."""
    logits = torch.randn(1, tokens, vocabulary, requires_grad=True)
    targets = torch.randint(vocabulary, (1, tokens))

    def step() -> list[Tensor]:
        logprobs, entropy = utils.selective_log_softmax_and_entropy(logits, targets, False)
        return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(logprobs.mean(), logits)]

    return compare("log-probs and entropies of logits", f"[{tokens}, {vocabulary}]", step, runs)


# --------------------------------------------------------------------------------------------------------------- main
def show(rows: list[Row], console: Console) -> None:
    """The table."""
    table = Table(title=f"TRL {fr.patch.trl().version} on {torch.get_num_threads()} threads", title_justify="left")
    fr.patch.undo()
    for heading in ("function", "shape", "TRL", "fastreward", "faster", "TRL's peak", "peak", "largest difference"):
        table.add_column(heading, justify="left" if heading in ("function", "shape") else "right")
    for row in rows:
        cells = (f"{row.stock_seconds:.3f} s", f"{row.patched_seconds:.3f} s", f"{row.ratio:.1f}x")
        peaks = (f"{row.stock_peak_mib:.0f} MiB", f"{row.patched_peak_mib:.0f} MiB", f"{row.difference:.1e}")
        table.add_row(row.function, row.shape, *cells, *peaks)
    console.print(table)


def main() -> None:
    """Measures, prints, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description="What TRL computes beside its model, stock and patched.")
    parser.add_argument("--rows", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    found: list[Row] = []
    for count in options.rows:
        found += losses(count, options.width, options.runs)
    if options.tokens:
        found.append(from_hidden_states(options.tokens, options.hidden, options.vocabulary, options.runs))
        found.append(from_logits(options.tokens, options.vocabulary, options.runs))
    show(found, Console(width=150))
    if options.json is not None:
        machine = {"platform": platform.platform(), "processor": _processor(), "threads": torch.get_num_threads()}
        versions = {"torch": torch.__version__, "fastreward": fr.__version__}
        record = {"machine": machine, "versions": versions, "rows": [{**asdict(r), "ratio": r.ratio} for r in found]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
