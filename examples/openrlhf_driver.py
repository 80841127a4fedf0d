"""OpenRLHF's own training code on the CPU, stock and patched: `python examples/openrlhf_driver.py`.

What runs is OpenRLHF's: `RemoteExperienceMaker.make_experience` and `compute_advantages_and_returns` over
micro-batches, then `ActorPPOTrainer.training_step` and `CriticPPOTrainer.training_step` on each, with losses and
backward. The models stand aside: their log-probs and values are random tensors, as Ray would hand them over. At last
comes one training step of a small language model through OpenRLHF's `Actor`, in bfloat16, at a temperature, with an
entropy bonus.

Once with OpenRLHF's functions and once after `fastreward.patch.openrlhf()`, each in a process of its own, forked from
one that holds the same inputs: seconds, the most memory beyond the inputs, the largest difference of what comes out.
With --batch 4096 --length 8192 OpenRLHF takes minutes, and both 4 GB.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import math
import mmap
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import rich
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastreward
from fastreward import patch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
from openrlhf_whole import stand_ins  # noqa: E402  # deepspeed, vllm and flash-attn need a GPU to install

PHASES = {
    "make_experience": "KL and its means",
    "advantages": "rewards, GAE, normalising",
    "actor": "policy loss and gradient",
    "critic": "value loss and gradient",
    "language model": "step of a language model",
}
RESULTS = ("advantages", "returns", "actor gradient", "critic gradient")
GROUP = 8


# -------------------------------------------------------------------------------------------------------- the trainer
def arguments(micro_batch: int) -> Any:
    """What OpenRLHF's command line makes of its options: PPO with a critic and a KL reward."""
    space = SimpleNamespace
    advantage = space(
        estimator="gae", gamma=1.0, lambd=0.95, no_std_norm=False, is_correction_level="token",
        is_correction_mode="mask", is_correction_gating="ratio", is_correction_threshold=[0.5, 5.0],
    )  # fmt: skip
    return space(
        algo=space(advantage=advantage, kl=space(use_loss=False, estimator="k2", init_coef=0.01)),
        actor=space(entropy_coef=None, aux_loss_coef=0.0),
        ds=space(ring_attn_size=1, tensor_parallel_size=1),
        train=space(
            colocate_all=False, colocate_actor_ref=False, colocate_critic_reward=False, dynamic_batch_enable=False
        ),
        rollout=space(n_samples_per_prompt=GROUP, micro_batch_size=micro_batch, max_new_tokens=None),
        reward=space(clip_range=(-10.0, 10.0), overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )


class Strategy:
    """DeepSpeed's part, on one process."""

    ring_attn_group = None

    def __init__(self, args: Any) -> None:
        self.args = args

    def backward(self, loss: Tensor, *_: Any) -> None:
        """To the leaves."""
        loss.backward()

    def optimizer_step(self, *_: Any, **__: Any) -> None:
        """None: the two runs are to see the same parameters."""

    def get_grad_norm(self, _: Any) -> float:
        """Of no parameter."""
        return 0.0


class Answers:
    """A group of Ray actors that has an answer to each micro-batch already."""

    def __init__(self, answers: list[Tensor]) -> None:
        self.answers = answers

    def async_run_method_batch(self, **_: Any) -> list[list[Tensor]]:
        """The answers, where Ray would promise them."""
        return [[x] for x in self.answers]


class Known(torch.nn.Module):
    """A model whose output for the micro-batch at hand is known: a leaf, whose gradient is what the loss makes."""

    output: Tensor

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, Any]:
        """(action log-probs or values, the model's other outputs)."""
        return self.output, None


def trainer(name: str, args: Any, **attributes: Any) -> Any:
    """OpenRLHF's trainer of that name, without the models and groups that its constructor starts."""
    module = importlib.import_module(f"openrlhf.trainer.ray.ppo_{name}")
    cls = getattr(module, f"{name.capitalize()}PPOTrainer")
    made = cls.__new__(cls)
    scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    vars(made).update({f"{name}_optim": None, f"{name}_scheduler": scheduler}, args=args, strategy=Strategy(args),
                      replay_buffer=None, aux_loss=False, ema_model=None, **attributes)  # fmt: skip
    return made


# ------------------------------------------------------------------------------------------------------------- inputs
class Inputs:
    """Rollouts of `batch` responses and what the models say of them, cut into micro-batches."""

    def __init__(self, batch: int, length: int, micro_batch: int) -> None:
        g = torch.Generator().manual_seed(0)

        def normal(scale: float) -> Tensor:
            return torch.randn(batch, length, generator=g).mul_(scale)

        ends = torch.randint(length // 4, length + 1, (batch, 1), generator=g)
        self.mask = (torch.arange(length) < ends).long()  # as OpenRLHF makes it
        self.old = normal(1.0).abs_().neg_().mul_(self.mask)
        self.ref, self.rollout = (normal(0.1).add_(self.old).mul_(self.mask) for _ in range(2))
        self.new = normal(0.1).add_(self.old).mul_(self.mask)
        self.values, self.new_values = (normal(1.0).mul_(self.mask) for _ in range(2))
        self.rewards = torch.randint(0, 5, (batch,), generator=g) / 4
        self.slices = [slice(i, i + micro_batch) for i in range(0, batch, micro_batch)]

    def samples(self) -> list[Any]:
        """What OpenRLHF's sampler hands to the experience maker."""
        make = importlib.import_module("openrlhf.trainer.ppo_utils.experience").Experience
        return [
            make(
                sequences=self.mask[s], attention_mask=self.mask[s], action_mask=self.mask[s],
                rollout_log_probs=self.rollout[s], rewards=self.rewards[s],
                index=list(range(s.start, s.start + len(self.rewards[s]))), info={"reward": self.rewards[s]},
            )
            for s in self.slices
        ]  # fmt: skip


def shared(*shape: int) -> Tensor:
    """Memory that a forked process writes and this one reads."""
    size = math.prod(shape)
    return torch.frombuffer(mmap.mmap(-1, 4 * size), dtype=torch.float32, count=size).view(shape)


# ---------------------------------------------------------------------------------------------------------- one side
class Side:
    """One run of everything, with its account of seconds and memory."""

    def __init__(self, inputs: Inputs, results: dict[str, Tensor], patched: bool) -> None:
        self.inputs, self.results = inputs, results
        self.report = patch.openrlhf() if patched else None
        self.console = Console(stderr=True)
        self.name = "fastreward" if patched else "OpenRLHF"
        self.account: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time and peak memory of what is done in it."""
        Path("/proc/self/clear_refs").write_text("5")
        before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        with self.console.status(f"{self.name}: {name}"):
            yield
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        self.account[name] = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "peak_mib": max(resident("VmHWM") - before, 0) / 2**20,
        }

    def run(self) -> dict[str, Any]:
        """Everything, in the order of a training step."""
        inputs, args = self.inputs, arguments(len(self.inputs.rewards[self.inputs.slices[0]]))
        module: Any = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
        module.ray = SimpleNamespace(put=lambda x: x, get=lambda x: x)
        module.logger.setLevel("WARNING")
        old, values, ref = ([x[s] for s in inputs.slices] for x in (inputs.old, inputs.values, inputs.ref))
        maker = module.RemoteExperienceMaker(
            Answers(old), Answers(values), None, Answers(ref), SimpleNamespace(value=0.01), Strategy(args), None
        )
        samples = inputs.samples()
        with self.phase("make_experience"):
            experiences = maker.make_experience(samples)
        with self.phase("advantages"):
            experiences = maker.compute_advantages_and_returns(experiences)
        for s, experience in zip(inputs.slices, experiences, strict=True):
            for name in ("advantages", "returns"):
                self.results[name][s] = getattr(experience, name) * experience.action_mask
        losses = importlib.import_module("openrlhf.models")
        policy = losses.PolicyLoss(0.2, 0.28, dual_clip=3.0, is_correction_level="token")
        actor = trainer("actor", args, actor=Known(), actor_loss_fn=policy)
        critic = trainer("critic", args, critic=Known(), critic_loss_fn=losses.ValueLoss(0.2))
        with self.phase("actor"):
            found = self.steps("actor", experiences, inputs.new, lambda e: actor.training_step(e, 0.0, 0), actor.actor)
        metrics = [float(status["metrics"]["policy_loss"]) for status in found]
        with self.phase("critic"):
            found = self.steps(
                "critic", experiences, inputs.new_values, lambda e: critic.training_step(e, 0), critic.critic
            )
        metrics += [status["critic_loss"] for status in found]
        metrics += self.language_model(args, losses)
        return {"phases": self.account, "metrics": metrics, "served": self.report and self.report.metrics()}

    def steps(
        self, name: str, experiences: list[Any], outputs: Tensor, step: Callable[[Any], Any], model: Known
    ) -> list[Any]:
        """A training step on each micro-batch."""
        found = []
        for s, experience in zip(self.inputs.slices, experiences, strict=True):
            model.output = outputs[s].detach().requires_grad_()
            found.append(step(experience))
            self.results[f"{name} gradient"][s] = model.output.grad
            model.output = torch.empty(0)
        return found

    def language_model(self, args: Any, losses: Any) -> list[float]:
        """OpenRLHF's training step with its Actor around a small Llama."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32_000, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
        )
        model = losses.Actor(LlamaForCausalLM(config).bfloat16(), temperature=0.8)
        model.packing_samples = False
        args.actor.entropy_coef = 0.01
        step = trainer("actor", args, actor=model, actor_loss_fn=losses.PolicyLoss())
        make = importlib.import_module("openrlhf.trainer.ppo_utils.experience").Experience
        ids, mask = torch.randint(32_000, (4, 257)), torch.ones(4, 257, dtype=torch.long)
        experience = make(
            sequences=ids, attention_mask=mask, action_mask=mask[:, 1:129],
            action_log_probs=torch.full((4, 128), -10.4), advantages=torch.randn(4, 128), info={},
        )  # fmt: skip
        step.training_step(experience, 0.0, 0)  # torch compiles OpenRLHF's entropy at the first call
        model.zero_grad()
        with self.phase("language model"):
            metrics = step.training_step(experience, 0.0, 0)["metrics"]
        norm = torch.stack([p.grad.float().norm() for p in model.parameters()]).norm()
        return [float(metrics["policy_loss"]), float(metrics["entropy_loss"]), float(norm)]


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def in_a_fork(inputs: Inputs, patched: bool, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a side says, in a process that ends with it, and its results."""
    results = {name: shared(*inputs.mask.shape) for name in RESULTS}
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(threads)
            with os.fdopen(writing, "w") as pipe:
                json.dump(Side(inputs, results, patched).run(), pipe)
            code = 0
        except BaseException:
            Console(stderr=True).print_exception()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"the {'patched' if patched else 'stock'} run has failed")
    return json.loads(said), results


# ----------------------------------------------------------------------------------------------------------- the table
def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest |ours - theirs| / max(1, |theirs|)."""
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


def show(rows: dict[str, Any]) -> Table:
    """Both sides of each phase, and of all."""
    table = Table(title="OpenRLHF's training code on the CPU", title_justify="left")
    for heading in ("what", "OpenRLHF", "fastreward", "faster", "peak MiB", "patched"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, row in rows.items():
        stock, ours = row["stock"], row["patched"]
        table.add_row(
            PHASES.get(name, name), f"{stock['seconds']:.3f} s", f"{ours['seconds']:.3f} s",
            f"{stock['seconds'] / ours['seconds']:.1f}x", f"{stock['peak_mib']:.0f}", f"{ours['peak_mib']:.0f}",
            end_section=name == list(PHASES)[-1],
        )  # fmt: skip
    return table


def main(
    batch: Annotated[int, typer.Option(min=GROUP, help=f"Responses, {GROUP} to a prompt.")] = 64,
    length: Annotated[int, typer.Option(min=8, help="Tokens of the longest.")] = 2048,
    micro_batch: Annotated[int, typer.Option(min=1, help="Responses of a micro-batch.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and of fastreward.")] = 2,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write the figures too.")] = None,
) -> None:
    """Run both sides and show them side by side."""
    if batch % GROUP:
        raise typer.BadParameter(f"expected a multiple of {GROUP}", param_hint="--batch")
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {output.parent}", param_hint="--json")
    warnings.simplefilter("ignore")  # what OpenRLHF's imports warn about is theirs
    torch.set_num_threads(1)  # a process whose OpenMP threads have run cannot be forked
    console = Console(stderr=True)
    with console.status("importing OpenRLHF"):
        missing = stand_ins()
        for name in ("ray.ppo_actor", "ray.ppo_critic", "ppo_utils.experience_maker"):
            importlib.import_module(f"openrlhf.trainer.{name}")
        import transformers.models.llama  # noqa: F401
    if missing:
        console.print(f"not installed, and stood in for: {', '.join(missing)}")
    inputs = Inputs(batch, length, micro_batch)
    stock, theirs = in_a_fork(inputs, False, threads)
    patched, ours = in_a_fork(inputs, True, threads)
    rows = {name: {"stock": stock["phases"][name], "patched": patched["phases"][name]} for name in PHASES}
    rows["all"] = {
        side: {
            "seconds": sum(row[side]["seconds"] for row in rows.values()),
            "cpu_seconds": sum(row[side]["cpu_seconds"] for row in rows.values()),
            "peak_mib": max(row[side]["peak_mib"] for row in rows.values()),
        }
        for side in ("stock", "patched")
    }
    differences = {name: difference(ours[name], theirs[name]) for name in RESULTS}
    differences["losses and metrics"] = difference(torch.tensor(patched["metrics"]), torch.tensor(stock["metrics"]))
    rich.print(show(rows))
    rich.print("largest differences:", ", ".join(f"{name} {x:.1e}" for name, x in differences.items()))
    served = patched["served"]
    rich.print(
        f"fastreward served {served['fastreward/calls']:.0f} calls, handed on {served['fastreward/handed_on']:.0f}"
    )
    if output is not None:
        figures = {
            "what": "examples/openrlhf_driver.py: OpenRLHF's own code, stock and patched, forked one after the other",
            "machine": machine(threads), "batch": batch, "length": length, "micro_batch": micro_batch,
            "phases": rows, "differences": differences,
        }  # fmt: skip
        output.write_text(json.dumps(figures, indent=1) + "\n")


def machine(threads: int) -> dict[str, Any]:
    """Where this was measured."""
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":")
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "fastreward": fastreward.__version__,
        "openrlhf": importlib.metadata.version("openrlhf"),
        "cpu": cpu.partition(":")[2].strip(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    typer.run(main)
