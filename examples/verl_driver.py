"""verl's own code between rollouts and optimizer, stock and on fastreward: `python examples/verl_driver.py`.

A `DataProto` as after the rollouts goes through what verl's trainer calls on its driver (balancing over ranks, the KL
penalty in the reward, rollout correction, `compute_advantage`), then through what its workers call (no padding,
micro-batches, the actor's `ppo_loss` and the critic's `value_loss`, each with its backward), first as verl has it, then
under `fastreward.patch.verl()`. A table shows time, peak memory and the largest difference of each step. No model is
run: log-probs and values of the model are random leaves, whose gradients are compared. Both sides go through `--rounds`
batches of one size, of which the last counts: all batches of a training run but the first find memory that one before
has left.

Needs verl (0.9). Half a minute on the CPU, most of it imports; `--batch 4096 --length 8192` takes minutes and 12 GiB.
"""

from __future__ import annotations

import os

os.environ["FASTREWARD_VERL"] = "off"  # not by the plugin: the first side is stock verl
os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")

import gc
import importlib.util
import json
import logging
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from fastreward import patch
from fastreward.bench.report import machine

SIDES = ("verl", "fastreward")
RANKS = 8
#: Steps of the driver and of the workers. "scores to advantages" is what the issue of verl's driver is about.
DRIVER = ("balance", "KL penalty", "rollout correction", "advantage")
WORKERS = ("no padding, micro-batches", "actor: loss and backward", "critic: loss and backward")
#: What still counts as equal: where a ratio is within rounding of a clip's edge, the share of clipped tokens of a
#: micro-batch moves by one token.
TOLERANCE = 1e-4


@dataclass
class Verl:
    """What is used of verl, looked up anew at each call, as its trainer does."""

    trainer: Any
    core: Any
    correction: Any
    losses: Any
    engine: Any
    tu: Any
    configs: Any
    algorithm: Any
    DataProto: Any


@dataclass
class Step:
    """One step of one side: seconds, bytes above what was there before, and what it gave."""

    seconds: float
    peak: int
    results: dict[str, Tensor] = field(default_factory=dict)


def load() -> Verl:
    """verl, without what it says while it is imported."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in ("torchdata", "torchdata.stateful_dataloader", "cachetools", "uvicorn", "fastapi"):
        if isinstance(sys.modules.get(name.partition(".")[0]), _Absent) or not _installed(name.partition(".")[0]):
            sys.modules[name] = _Absent(name)
    module = importlib.import_module
    return Verl(
        trainer=module("verl.trainer.ppo.ray_trainer"),
        core=module("verl.trainer.ppo.core_algos"),
        correction=module("verl.trainer.ppo.rollout_corr_helper"),
        losses=module("verl.workers.utils.losses"),
        engine=module("verl.workers.engine.utils"),
        tu=module("verl.utils.tensordict_utils"),
        configs=module("verl.workers.config"),
        algorithm=module("verl.trainer.config.algorithm"),
        DataProto=module("verl").DataProto,
    )


def _installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


class _Absent(types.ModuleType):
    """Stands for a package that verl's trainer imports to load data and to reach rollout engines: not used here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


# ----------------------------------------------------------------------------------------------------------- the batch
def rollouts(verl: Verl, batch: int, length: int, prompt: int, group: int) -> Any:
    """A `DataProto` as after the rollouts: left-padded prompts, ragged responses, scores on the last token."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(prompt // 2, prompt + 1, (batch, 1), generator=g)
    responses = (torch.randn(batch, 1, generator=g).mul(0.7).exp() * length * 0.4).long().clamp(1, length)
    of_prompt = torch.arange(prompt) >= prompt - prompts
    of_response = torch.arange(length) < responses
    mask = torch.cat([of_prompt, of_response], dim=1).long()
    ids = torch.randint(0, 32000, mask.shape, generator=g)
    old = torch.empty(batch, length).exponential_(2.0, generator=g).neg_()
    near = [old + torch.empty_like(old).normal_(0.0, 0.1, generator=g) for _ in range(2)]
    scores = torch.zeros(batch, length)
    scores.scatter_(1, responses - 1, torch.randint(0, 2, (batch, 1), generator=g).float())
    tensors = {
        "prompts": ids[:, :prompt].contiguous(),
        "responses": ids[:, prompt:].contiguous(),
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "response_mask": mask[:, prompt:].contiguous(),
        "rm_scores": scores,
        "old_log_probs": old,
        "ref_log_prob": near[0],
        "rollout_log_probs": near[1],
        "values": torch.randn(batch, length, generator=g) * 0.1,
    }
    uids = np.array([f"prompt-{b // group}" for b in range(batch)], dtype=object)
    return verl.DataProto.from_dict(tensors, non_tensors={"uid": uids}, meta_info={})


# ----------------------------------------------------------------------------------------------------------- the driver
def balance(verl: Verl, data: Any, _: str) -> dict[str, Tensor]:
    """`RayPPOTrainer._balance_batch`, over eight ranks."""
    trainer = types.SimpleNamespace(_get_dp_size=lambda *_: RANKS, actor_rollout_wg=None)
    metrics: dict[str, float] = {}
    verl.trainer.RayPPOTrainer._balance_batch(trainer, data, metrics)
    return {"order": data.batch["responses"][:, 0], "metrics": _numbers(metrics)}


def kl_penalty(verl: Verl, data: Any, _: str) -> dict[str, Tensor]:
    """`apply_kl_penalty`, with the k3 estimate."""
    data.batch["token_level_scores"] = data.batch["rm_scores"]
    _, metrics = verl.trainer.apply_kl_penalty(data, verl.core.FixedKLController(0.01), "low_var_kl")
    return {"rewards": data.batch["token_level_rewards"], "metrics": _numbers(metrics)}


def rollout_correction(verl: Verl, data: Any, _: str) -> dict[str, Tensor]:
    """`compute_rollout_correction_and_add_to_batch`: truncated importance weights of tokens."""
    config = verl.algorithm.RolloutCorrectionConfig.decoupled_token_is()
    _, metrics = verl.correction.compute_rollout_correction_and_add_to_batch(data, config)
    return {"weights": data.batch["rollout_is_weights"], "metrics": _numbers(metrics)}


def advantage(verl: Verl, data: Any, estimator: str) -> dict[str, Tensor]:
    """`compute_advantage`."""
    config = verl.algorithm.AlgoConfig(adv_estimator=estimator)
    verl.trainer.compute_advantage(data, verl.core.AdvantageEstimator(estimator), 1.0, 0.95, config=config)
    return {name: data.batch[name] for name in ("advantages", "returns", "response_mask")}


# ---------------------------------------------------------------------------------------------------------- the workers
_OF_WORKERS = (
    "prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask", "old_log_probs",
    "ref_log_prob", "rollout_is_weights", "values", "advantages", "returns",
)  # fmt: skip


def micro_batches(verl: Verl, data: Any, batches: list[Any]) -> dict[str, Tensor]:
    """`left_right_2_no_padding`, as before an update, then `prepare_micro_batches`, as in a worker."""
    tokens = int(data.batch["response_mask"].sum())
    room = max(32768, data.batch["input_ids"].shape[1])
    given = verl.trainer.left_right_2_no_padding(data.select(batch_keys=list(_OF_WORKERS)).to_tensordict())
    verl.tu.assign_non_tensor(
        given,
        dp_size=1,
        batch_num_tokens=tokens,
        global_batch_size=len(data),
        use_dynamic_bsz=True,
        max_token_len_per_gpu=room,
    )
    made, order = verl.engine.prepare_micro_batches(given)
    batches += made
    return {"order": torch.tensor([i for part in order for i in part])}


def update(verl: Verl, batches: list[Any], critic: bool) -> dict[str, Tensor]:
    """`ppo_loss` or `value_loss` of each micro-batch and its backward: losses, and gradients of the model's outputs."""
    actor = verl.configs.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_high=0.28,
        entropy_coeff=0.01,
        use_kl_loss=True,
        policy_loss=verl.configs.PolicyLossConfig(),
    )
    judge = verl.configs.CriticConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, enable=False)
    losses, gradients, metrics = [], [], []
    for k, micro in enumerate(batches):
        outputs = _outputs(micro, critic, torch.Generator().manual_seed(k))
        nested = {name: _as_sequences(leaf, micro) for name, leaf in outputs.items()}
        loss_of = verl.losses.value_loss if critic else verl.losses.ppo_loss
        loss, logged = loss_of(judge if critic else actor, nested, micro)
        loss.backward()
        losses.append(float(loss.detach()))
        metrics.append(_numbers(logged))
        gradients += [leaf.grad for leaf in outputs.values()]
    return {"loss": torch.tensor(losses), "metrics": torch.stack(metrics), "gradients": torch.cat(gradients)}


def _outputs(micro: Any, critic: bool, generator: torch.Generator) -> dict[str, Tensor]:
    """Stand-ins for a model's outputs for every token of the micro-batch: leaves [N]."""
    tokens = micro["input_ids"].values().shape[0]
    if critic:
        return {"values": (torch.randn(tokens, generator=generator) * 0.1).requires_grad_()}
    logprobs = torch.empty(tokens).exponential_(2.0, generator=generator).neg_()
    return {"log_probs": logprobs.requires_grad_(), "entropy": torch.rand(tokens, generator=generator).requires_grad_()}


def _as_sequences(leaf: Tensor, micro: Any) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(leaf, micro["input_ids"].offsets())


def _numbers(metrics: dict[str, Any]) -> Tensor:
    """verl's metrics by their names: numbers, or a `Metric` that waits for those of other micro-batches."""
    found = (metrics[name] for name in sorted(metrics))
    return torch.tensor([float(x.aggregate() if hasattr(x, "aggregate") else x) for x in found], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- measurement
def measured(step: Callable[[], dict[str, Tensor]]) -> Step:
    """Seconds, and how far the memory of this process rises above what it has now (Linux; 0 elsewhere)."""
    gc.collect()
    before = _memory("VmRSS", reset=True)
    started = time.perf_counter()
    results = step()
    seconds = time.perf_counter() - started
    return Step(seconds, max(0, _memory("VmHWM") - before), results)


def _memory(name: str, *, reset: bool = False) -> int:
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return 0
    if reset:
        clear.write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run(
    verl: Verl, data: Any, estimator: str, workers: bool, step: Callable[[str], None]
) -> Iterator[tuple[str, Step]]:
    """All steps over one batch, which they change."""
    for name, call in zip(DRIVER, (balance, kl_penalty, rollout_correction, advantage), strict=True):
        step(name)
        yield name, measured(partial(call, verl, data, estimator))
    if not workers:
        return
    batches: list[Any] = []
    step(WORKERS[0])
    yield WORKERS[0], measured(partial(micro_batches, verl, data, batches))
    for name, critic in zip(WORKERS[1:], (False, True), strict=True):
        if not critic or estimator == "gae":
            step(name)
            yield name, measured(partial(update, verl, batches, critic))


def difference(stock: Step, ours: Step) -> float:
    """The largest difference of any of the results, relative where they are above 1; beyond responses nobody looks."""
    mask = stock.results.get("response_mask", torch.ones(()))
    found = 0.0
    for name, x in stock.results.items():
        y = ours.results[name]
        if x.shape != y.shape:
            return float("inf")
        for a, b, counted in zip(*(z.flatten().split(1 << 22) for z in (x, y, mask.expand(x.shape))), strict=True):
            far = (a.double() - b.double()).abs() / a.double().abs().clamp(min=1.0) * counted
            found = max(found, float(far.max()) if far.numel() else 0.0)
    return found


# ---------------------------------------------------------------------------------------------------------- the table
def rows(sides: dict[str, dict[str, Step]]) -> list[dict[str, Any]]:
    """Each step, and what they add up to."""
    stock, ours = (sides[side] for side in SIDES)
    found = [
        {
            "step": name,
            "seconds": {side: sides[side][name].seconds for side in SIDES},
            "peak_bytes": {side: sides[side][name].peak for side in SIDES},
            "difference": difference(stock[name], ours[name]),
        }
        for name in stock
    ]
    sums = {"driver, scores to advantages": DRIVER[1:], "driver": DRIVER}
    if WORKERS[0] in stock:
        sums |= {"workers": WORKERS, "all": DRIVER + WORKERS}
    for title, names in sums.items():
        part = [row for row in found if row["step"] in names]
        found.append(
            {
                "step": title,
                "sum": True,
                "seconds": {side: sum(row["seconds"][side] for row in part) for side in SIDES},
                "peak_bytes": {side: max(row["peak_bytes"][side] for row in part) for side in SIDES},
                "difference": max(row["difference"] for row in part),
            }
        )
    return found


def show(found: list[dict[str, Any]], title: str) -> Table:
    """Times, peaks and differences side by side."""
    table = Table("", title=title, title_justify="left")
    for heading in ("verl ms", "fastreward ms", "", "verl MiB", "fastreward MiB", "difference"):
        table.add_column(heading, justify="right")
    for row in found:
        stock, ours = (row["seconds"][side] for side in SIDES)
        peaks = [f"{row['peak_bytes'][side] / 2**20:,.0f}" for side in SIDES]
        times = f"{stock * 1e3:,.1f}", f"{ours * 1e3:,.1f}", f"{stock / ours:,.1f}x"
        table.add_row(row["step"], *times, *peaks, f"{row['difference']:.1e}", style="bold" if "sum" in row else "")
    return table


def _tell(progress: Progress, bar: Any, side: str, name: str) -> None:
    progress.update(bar, description=f"{side}: {name}")


def main(
    batch: Annotated[int, typer.Option(min=RANKS, help="Sequences; a multiple of 8.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="The longest response.")] = 2048,
    prompt: Annotated[int, typer.Option(min=2, help="The longest prompt.")] = 128,
    group: Annotated[int, typer.Option(min=1, help="Rollouts of a prompt.")] = 8,
    estimator: Annotated[str, typer.Option(help="algorithm.adv_estimator: gae, grpo, rloo, ...")] = "gae",
    workers: Annotated[bool, typer.Option(help="Also what the workers do, or the driver alone.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Batches of each side, of which the last counts.")] = 2,
    output: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
) -> None:
    """Time verl's driver and worker functions on the CPU, stock and under fastreward.patch.verl()."""
    if batch % RANKS:
        raise typer.BadParameter(f"expected a multiple of {RANKS}, the ranks, got {batch}", param_hint="--batch")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("importing verl", total=2 * rounds * (len(DRIVER) + len(WORKERS)))
        verl = load()
        sides: dict[str, dict[str, Step]] = {}
        for side in SIDES:
            if side != "verl":
                patch.verl()
            for _ in run(verl, rollouts(verl, RANKS, 16, 8, 2), estimator, workers, lambda _: None):
                pass  # the first calls of each kind: imports, threads, a loss that is made into a program
            for _ in range(rounds):
                sides[side], data = {}, rollouts(verl, batch, length, prompt, group)
                for name, step in run(verl, data, estimator, workers, partial(_tell, progress, bar, side)):
                    sides[side][name] = step
                    progress.advance(bar)
        status = patch.status()["verl"]
        progress.update(bar, description="comparing")
        found = rows(sides)
    tokens = int(data.batch["response_mask"].sum())
    rich.print(show(found, f"{batch:,} sequences, {tokens:,} of {batch * length:,} response tokens, {estimator}"))
    served = status.total
    rich.print(
        f"fastreward served {served.calls:,} calls of verl {status.version}; {served.handed_on:,} went on to verl."
    )
    if output is not None:
        settings = {"batch": batch, "length": length, "prompt": prompt, "group": group, "estimator": estimator}
        settings["rounds"] = rounds
        figures = {"machine": machine("cpu"), "program": "examples/verl_driver.py", "settings": settings}
        output.write_text(json.dumps(figures | {"tokens": tokens, "rows": found}, indent=1) + "\n")
    worst = max(row["difference"] for row in found)
    if worst > TOLERANCE:
        rich.print(f"[red]Results differ by {worst:.1e}, more than {TOLERANCE:g}.[/]")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
