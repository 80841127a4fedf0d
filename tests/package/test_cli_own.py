"""`fastreward verify --loss` and `bench --loss`: a loss, a divergence and peers of one's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastreward import losses
from fastreward.bench import own as bench_own
from fastreward.bench import peers
from fastreward.bench.cases import _steps
from fastreward.cli import app
from fastreward.language.define import Definition
from fastreward.verify import run
from fastreward.verify.error import distance
from fastreward.verify.own import forms, inputs, load, problems

_SOURCE = '''
import torch
from fastreward import divergences, losses

@losses.define
def surprise(t, floor=0.1, cap=2.0):
    surprise = -t.logprob / losses.maximum(losses.seq_mean(-t.logprob), 0.01)
    weight = losses.stop_gradient(losses.clip(surprise, floor, cap))
    return -weight * t.advantage * losses.minimum(t.ratio, cap)

@losses.define
def needing(t, beta):
    return -t.advantage * t.ratio * beta

@losses.define
def with_extras(t, coef=0.1):
    weight = t.extra("turn_weight", per="sequence") + t.extra("scale", per="batch")
    return -weight * t.advantage * t.ratio + coef * (t.logprob - t.extra("teacher_logprob"))

@losses.define
def endless(t):
    return t.logprob * losses.log(t.extra("x"))

@losses.define
def ahead(t, gamma=0.9):
    return -t.advantage * t.ratio * losses.stop_gradient(losses.exp(losses.seq_discounted_sum(t.log_ratio, gamma)))

@losses.define(pairs=True)
def turns(t):
    sides = [losses.segment_sum(side.logprob, side.extra("turn_ids")) for side in (t.chosen, t.rejected)]
    return losses.seq_mean(sides[1]) - losses.seq_mean(sides[0])

@losses.define
def misread(t):
    return t.logprob * t.turn_ids

@losses.define
def untrained(t):
    return t.advantage * 2.0

@losses.define(aggregation="group-mean")
def grouped(t, beta=0.1):
    return -(t.advantage - losses.group_mean(losses.seq_mean(t.logprob))) * t.ratio * beta

@losses.define(pairs=True)
def hinge(t, beta=0.1):
    margin = losses.seq_sum(t.chosen.log_ratio) - losses.seq_sum(t.rejected.log_ratio)
    return losses.maximum(1.0 - beta * margin * t.extra("score"), 0.0)

@losses.define
def critic(t):
    return (t.value - t.returns) ** 2

@divergences.define
def chi_squared(t):
    return t.q * (t.p / t.q - 1.0) ** 2

SLOPED = surprise(cap=3.0)
TENSOR = needing(torch.ones(3))

def factory():
    return surprise

def broken():
    raise RuntimeError("no luck")

def peer(logprobs, old_logprobs, advantages, mask):
    mean = (-logprobs * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    weight = (-logprobs / mean.clamp(min=0.01)).clamp(0.1, 2.0).detach()
    return (-weight * advantages * (logprobs - old_logprobs).exp().clamp(max=2.0) * mask).sum() / mask.sum()

def detached(logprobs, old_logprobs, advantages, mask):
    """The right value, the wrong gradient."""
    return peer(logprobs, old_logprobs, advantages, mask).detach() + 0.0 * logprobs.sum()

def changing(logprobs, advantages):
    return (logprobs * advantages.neg_()).sum()

def asking(logprobs, temperature):
    return logprobs.sum()

def of_all(**given):
    return peer(**{k: given[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")}), given

def per_token(logprobs):
    return logprobs

def chi(logits, teacher_logits):
    p, q = logits.softmax(-1), teacher_logits.softmax(-1)
    return ((p - q) ** 2 / q).sum(-1)
'''


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(_SOURCE)
    return str(path)


def _run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def _refusal(result: Any) -> str:
    assert result.exit_code == 2, result.output
    return re.sub(r"[\s│]+", " ", re.sub(r"[╭╰╮╯─]", "", result.output))


# ------------------------------------------------------------------------------------------------------------- verify
@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("surprise", "policy_loss"),
        ("SLOPED", "policy_loss"),
        ("factory", "policy_loss"),
        ("with_extras", "policy_loss"),
        ("grouped", "policy_loss"),
        ("hinge", "preference_loss"),
        ("critic", "value_loss"),
        ("chi_squared", "divergence"),
    ],
)
def test_verify(file: str, name: str, operation: str) -> None:
    facts = json.loads(_run("verify", "--loss", f"{file}:{name}", "--quick", "--json").stdout)
    assert facts["passed"], facts["failures"]
    assert {x["backend"] for x in facts["worst"]} >= {"reference", "cpu"}
    assert all(x["operation"].startswith(operation) for x in facts["worst"])
    assert any(x["output"].startswith("grad") for x in facts["worst"])


def test_verify_says_where_a_loss_is_undefined(file: str) -> None:
    result = _run("verify", "--loss", f"{file}:chi_squared", "--quick", "--backend", "cpu")
    assert result.exit_code == 0
    assert "skipped 'tokens that neither allows' on every backend" in result.stdout


def test_verify_fails_where_a_kernel_is_wrong(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = forms.ours

    def wrong(what: inputs.Own) -> forms.Form:
        form = right(what)
        return lambda **given: form(**given) * 1.001

    monkeypatch.setattr(problems, "ours", wrong)
    result = _run("verify", "--loss", f"{file}:surprise", "--quick", "--backend", "cpu")
    assert result.exit_code == 1
    assert "grad of logprobs is" in result.stdout


def test_verify_peers(file: str) -> None:
    names = [x for name in ("peer", "detached", "of_all") for x in ("--peer", f"{file}:{name}")]
    result = _run("verify", "--loss", f"{file}:surprise", *names, "--quick", "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert {(x["backend"], x["output"]) for x in facts["failures"]} == {("detached", "grad of logprobs")}
    assert {x["backend"] for x in facts["worst"]} >= {"peer", "of_all", "detached"}
    assert _run("verify", "--loss", f"{file}:chi_squared", "--peer", f"{file}:chi", "--quick").exit_code == 0


def test_verify_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "_SHAPE", (4, 9))
    assert _run("verify", "--loss", "fastreward.losses:cispo", "--quick", "--backend", "cpu").exit_code == 0


# -------------------------------------------------------------------------------------------------------------- bench
@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes seconds."""
    monkeypatch.setattr(peers, "compiled", lambda function: function)


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize(("name", "peer"), [("surprise", "peer"), ("chi_squared", "chi"), ("hinge", None)])
def test_bench(file: str, tmp_path: Path, name: str, peer: str | None) -> None:
    path = tmp_path / "figures.json"
    options = ("--quick", "--rows", 4, "--vocab", 300, "--seconds", 0.01, "--json", path)
    given = () if peer is None else ("--peer", f"{file}:{peer}")
    result = _run("bench", "--loss", f"{file}:{name}", *given, *options)
    assert result.exit_code == 0, result.output
    (case,) = json.loads(path.read_text())["cases"]
    assert case["shape"][0] == 4
    assert case["case"] == name
    assert case["limit_ms"] > 0
    wanted = ["fastreward", "torch eager", "torch.compile", *(() if peer is None else (peer, f"{peer}, compiled"))]
    assert [x["name"] for x in case["contenders"]] == wanted
    assert case["absent"] == {}


@pytest.mark.parametrize("name", ["ahead", "turns"])
def test_bench_leaves_a_scan_uncompiled(file: str, tmp_path: Path, name: str) -> None:
    path = tmp_path / "figures.json"
    result = _run("bench", "--loss", f"{file}:{name}", "--quick", "--rows", 4, "--seconds", 0.01, "--json", path)
    assert result.exit_code == 0, result.output
    (case,) = json.loads(path.read_text())["cases"]
    assert [x["name"] for x in case["contenders"]] == ["fastreward", "torch eager"]
    assert "unrolls a scan" in case["absent"]["torch.compile"]


@pytest.mark.usefixtures("not_compiled")
def test_bench_does_not_time_what_is_not_equal(file: str) -> None:
    options = ("--quick", "--rows", 4, "--seconds", 0.01)
    result = _run("bench", "--loss", f"{file}:surprise", "--peer", f"{file}:detached", *options)
    assert result.exit_code == 1
    assert "detached: not equivalent" in result.stdout


@pytest.mark.usefixtures("not_compiled")
def test_bench_times_nothing_where_ours_is_wrong(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = forms.ours
    monkeypatch.setattr(bench_own, "ours", lambda what: lambda **x: right(what)(**x) + 0.1)
    result = _run("bench", "--loss", f"{file}:surprise", "--quick", "--rows", 4, "--seconds", 0.01)
    assert result.exit_code == 1
    assert "nothing was timed" in result.stdout


def test_bench_alone(file: str) -> None:
    result = _run("bench", "--loss", f"{file}:grouped", "--quick", "--rows", 4, "--seconds", 0.01, "--no-peers")
    assert result.exit_code == 0, result.output
    assert "torch eager" not in result.stdout


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needing", "needs the parameters beta; give them defaults"),
        ("TENSOR", "its parameters beta are tensors"),
        ("peer", "got a function of logprobs, old_logprobs, advantages, mask. Is losses.define missing above it?"),
        ("broken", "calling it raises RuntimeError: no luck"),
        ("nothing", "has no 'nothing'; it has surprise, needing"),
        ("torch.pi", "expected a loss or divergence"),
        ("endless", "endless: its value on random inputs"),
        ("misread", "no term 'turn_ids'; one of your own is t.extra('turn_ids')"),
        ("untrained", "untrained: reads advantage, and nothing of it is trained"),
    ],
)
def test_refusals(file: str, command: str, name: str, message: str) -> None:
    assert message in _refusal(_run(command, "--loss", f"{file}:{name}", "--quick"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "--loss", "surprise"), "surprise: expected module:function or file.py:function"),
        (("verify", "--loss", "nowhere:x"), "nowhere can't be imported: ModuleNotFoundError"),
        (("verify", "--loss", "nowhere.py:x"), "there is no file nowhere.py"),
        (("verify", "whiten", "--loss", "a:b"), "--loss: does not go with operations"),
        (("bench", "--loss", "a:b", "--sweep"), "--loss: does not go with --sweep"),
        (("bench", "--loss", "a:b", "--dtype", "bfloat16"), "--loss: does not go with --dtype"),
        (("verify", "--peer", "a:b"), "--peer: goes with --loss"),
        (("bench", "--peer", "a:b"), "--peer: goes with --loss"),
        (("verify", "--loss", "fastreward.losses:ppo", "--backend", "nope"), "unknown backend 'nope'"),
    ],
)
def test_refusals_of_options(arguments: tuple[str, ...], message: str) -> None:
    assert message in _refusal(_run(*arguments))


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        ("changing", "changes advantages in place, which the others are given too"),
        ("asking", "asks for 'temperature'; there are advantages, logprobs, mask, old_logprobs"),
        ("per_token", "expected it to return one number, got shape"),
        ("SLOPED", "expected a plain function of tensors"),
        ("factory", "expected a function of logprobs, by that name"),
    ],
)
def test_refusals_of_peers(file: str, peer: str, message: str) -> None:
    assert message in _refusal(_run("verify", "--loss", f"{file}:surprise", "--peer", f"{file}:{peer}", "--quick"))


def test_two_peers_of_one_name(file: str) -> None:
    twice = ("--peer", f"{file}:peer") * 2
    assert "with names of their own" in _refusal(_run("verify", "--loss", f"{file}:surprise", *twice))


# -------------------------------------------------------------------------------------------------------------- forms
def _published() -> list[str]:
    definitions = {name: getattr(losses, name) for name in losses.__all__}
    return [
        name
        for name, d in definitions.items()
        if isinstance(d, Definition) and all(p.default is not p.empty for p in d.__signature__.parameters.values())
    ]


@pytest.mark.parametrize("name", _published())
def test_every_published_loss_can_be_made_up(name: str) -> None:
    """Ours, the graph in plain torch and its careful form agree, with gradients."""
    what = inputs.own(load.loss(f"fastreward.losses:{name}"))
    given = inputs.made_up(what, (8, 17))
    truth = forms.step(forms.plain(what, careful=True), what.trained, inputs.double(given))
    assert all(x.isfinite().all() for x in truth)
    assert any(bool((x != 0).any()) for x in truth)
    found = forms.step(forms.ours(what), what.trained, given)
    for k, (got, want) in enumerate(zip(found, truth, strict=True)):
        assert distance(got, want, of_gradient=k > 0) < 1e-5
    eager = forms.step(forms.plain(what, careful=True), what.trained, given)
    assert distance(eager[0], truth[0]) < 1e-5


def test_made_up_extras_hold_what_their_names_say() -> None:
    @losses.define
    def reading(t: Any) -> Any:
        extras = ("teacher_logprob", "tool_mask", "win_prob", "turn_ids", "step_weight", "other")
        return t.logprob * sum(t.extra(name) for name in extras)

    what = inputs.own(reading())
    given = inputs.made_up(what, (16, 40))
    assert (given["teacher_logprob"] <= 0).all()
    assert set(given["tool_mask"].unique().tolist()) == {0.0, 1.0}
    assert given["win_prob"].min() >= 0
    assert given["win_prob"].max() <= 1
    assert torch.equal(given["turn_ids"], given["turn_ids"].round())
    assert given["step_weight"].min() >= 0.5
    assert given["other"].min() < 0 < given["other"].max()
    assert what.extras == tuple(sorted(what.extras))


def test_the_peers_findings_need_every_gradient() -> None:
    what = inputs.own(load.loss("fastreward.losses:ppo"))
    problem = next(iter(problems.problems(what, quick=True)))
    findings = run.of_peer("mine", problem, {"loss": problem.truth(problem.inputs)["loss"]})
    assert [f.output for f in findings if not f.ok] == ["grad of logprobs"]


@pytest.mark.parametrize("share", [0.0, 0.99])
def test_a_wrong_gradient_is_seen_however_small_gradients_are(share: float) -> None:
    """Those of a mean over 4M tokens are below any absolute bound."""
    truth = torch.tensor(0.5).double(), 1e-7 * torch.randn(1000).double()
    for error in (_steps.worst_of_step, _steps.off_edges):
        assert error(truth, truth) == 0.0
        assert error(truth, (truth[0], share * truth[1])) > 5e-3
    first = torch.arange(2)
    rows = truth[0].expand(3), truth[1].reshape(4, -1)[:3]
    assert _steps.worst_of_rows((first, tuple(x[:2] for x in rows)), True, (rows[0], share * rows[1])) > 5e-3
