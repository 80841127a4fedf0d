"""The OpenRLHF drop-in in Actor.forward: one call of the model, log-probs, entropy, gradients, padded and packed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compat import largest
from openrlhf_whole import stand_ins
from torch import Tensor

pytest.importorskip("openrlhf")
pytest.importorskip("peft")
stand_ins()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

from fastreward import patch  # noqa: E402

TARGET = "openrlhf.models.actor.Actor.forward"
B, S, A, V, H = 4, 17, 9, 97, 16


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    patch.undo()
    module: Any = importlib.import_module("openrlhf.models.actor")
    compiled = module.compute_entropy
    module.compute_entropy = compiled._torchdynamo_orig_callable  # compiling it takes seconds
    yield
    patch.undo()
    module.compute_entropy = compiled


class Output(dict[str, Any]):
    """What a Hugging Face model returns, as far as it is read."""

    entropy: Tensor


class Model(torch.nn.Module):
    """Logits of an embedding, in a dtype; counts its calls and keeps their arguments."""

    def __init__(self, dtype: torch.dtype, bounded: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(V, H, generator=g))
        self.head = torch.nn.Parameter(torch.randn(V, H, generator=g) / 4)
        self.dtype, self.bounded = dtype, bounded
        self.calls: list[dict[str, Any]] = []

    def forward(self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Output:
        self.calls.append({"ids": ids, "attention_mask": attention_mask, "position_ids": position_ids})
        logits = (self.table[ids] * (1 + position_ids.unsqueeze(-1) / S)) @ self.head.T
        return Output(logits=(logits.tanh() if self.bounded else logits).to(self.dtype))


def actor(dtype: torch.dtype = torch.float32, *, packed: bool = False, temperature: float = 1.0, **model: Any) -> Any:
    made = importlib.import_module("openrlhf.models").Actor(Model(dtype, **model), temperature=temperature)
    made.packing_samples = packed
    return made


def batch() -> Any:
    """Left-padded prompts, responses of different lengths; a tool's tokens inside."""
    g = torch.Generator().manual_seed(1)
    attention = torch.ones(B, S, dtype=torch.long)
    attention[0, :3], attention[1, 13:], attention[2, 15:] = 0, 0, 0
    action = attention[:, -A:].clone()
    action[3, 3:5] = 0
    return SimpleNamespace(
        sequences=torch.randint(V, (B, S), generator=g), attention=attention, action=action,
        upstream=torch.randn(B, S, generator=g), bonus=torch.randn(B, S, generator=g),
    )  # fmt: skip


def run(made: Any, b: Any, *, entropy: bool, **options: Any) -> dict[str, Any]:
    """Log-probs, entropies where they are read, and the gradient of both for the model's parameters."""
    found = made(b.sequences, attention_mask=b.attention, return_output=True, return_entropy=entropy, **options)
    log_probs, output = found
    loss = (log_probs * b.upstream[:, : log_probs.shape[1]]).sum()
    result = {"log_probs": log_probs.detach()}
    if entropy:
        mask = options["action_mask"] if "action_mask" in options else torch.ones(B, S - 1)
        read = output.entropy[:, -mask.shape[1] :] * mask
        assert output.entropy.shape == (B, S - 1)
        loss = loss + (read * b.bonus[:, : mask.shape[1]]).sum()
        result["entropy"] = read.detach()
    gradients = torch.autograd.grad(loss, [made.model.table, made.model.head])
    return result | {"gradients": gradients, "calls": made.model.calls}


def compare(make: Any, b: Any, tolerance: float = 5e-6, **options: Any) -> None:
    """Ours beside theirs, each with a model of its own; one call of the model for each, and the same one."""
    patch.undo()
    theirs = run(make(), b, **options)
    report = patch.openrlhf()
    ours = run(make(), b, **options)
    usage = report.usage[TARGET]
    assert (usage.calls, usage.handed_on, usage.tokens) == (1, 0, B * S)
    assert len(ours["calls"]) == 1
    largest(TARGET, ours, theirs, atol=tolerance, rtol=tolerance, what=str(options))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_action_log_probs(dtype: torch.dtype, temperature: float, entropy: bool, packed: bool) -> None:
    b = batch()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-4  # the gradient of a bfloat16 logit is rounded once in either
    compare(
        lambda: actor(dtype, packed=packed, temperature=temperature),
        b,
        tolerance,
        entropy=entropy,
        action_mask=b.action,
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("entropy", [False, True])
def test_log_probs_of_all_tokens(entropy: bool, packed: bool) -> None:
    """As SFT and DPO ask for them."""
    compare(lambda: actor(packed=packed, temperature=0.7), batch(), 1e-5, entropy=entropy, return_logprobs=True)


def test_a_model_that_saves_its_logits_can_be_trained_at_any_temperature() -> None:
    """OpenRLHF divides the model's logits in place: a model that ends in tanh (a softcap of 1) has saved them."""
    b = batch()
    patch.undo()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(actor(temperature=0.7, bounded=True), b, entropy=True, action_mask=b.action)
    patch.openrlhf()
    made = actor(temperature=0.7, bounded=True)
    found = run(made, b, entropy=True, action_mask=b.action)
    made.double()
    made.model.dtype = torch.float64
    logits = made.model(b.sequences, None, made.model.calls[0]["position_ids"])["logits"] / 0.7
    rows = logits.log_softmax(-1)[:, :-1][:, -A:]
    picked = rows.gather(-1, b.sequences[:, 1:][:, -A:].unsqueeze(-1)).squeeze(-1) * b.action
    entropy = -(rows.exp() * rows).sum(-1) * b.action
    loss = (picked * b.upstream[:, :A]).sum() + (entropy * b.bonus[:, :A]).sum()
    want = torch.autograd.grad(loss, [made.model.table, made.model.head])
    for x, y in zip(found["gradients"], want, strict=True):
        torch.testing.assert_close(x, y.float(), atol=2e-5, rtol=1e-4)


def test_logits_stay_as_the_model_gave_them() -> None:
    """No float32 copy of them is made, and none is scaled."""
    b = batch()
    patch.openrlhf()
    made = actor(torch.bfloat16, temperature=0.5)
    _, output = made(b.sequences, b.action, b.attention, return_output=True, return_entropy=True)
    assert output["logits"].dtype == torch.bfloat16
    again = made.model(b.sequences, None, made.model.calls[0]["position_ids"])["logits"]
    assert torch.equal(output["logits"], again)


def test_float64_logits_are_scored_in_float32() -> None:
    b = batch()
    compare(lambda: actor(torch.float64, temperature=0.7), b, 1e-5, entropy=True, action_mask=b.action)


def test_what_fastreward_does_not_take_is_scored_by_openrlhf_without_a_second_call_of_the_model() -> None:
    """A tensor subclass, such as the DTensor of a tensor-parallel head."""

    class Sharded(Tensor):
        pass

    class Parallel(Model):
        def forward(self, *args: Any, **kwargs: Any) -> Output:
            return Output(logits=super().forward(*args, **kwargs)["logits"].as_subclass(Sharded))

    b = batch()
    patch.undo()
    made = actor(temperature=0.7)
    want = made(b.sequences, b.action, b.attention)
    patch.openrlhf()
    made.model.__class__, made.model.calls = Parallel, []
    got = made(b.sequences, b.action, b.attention)
    torch.testing.assert_close(got.as_subclass(Tensor), want)
    assert len(made.model.calls) == 1


@pytest.mark.parametrize("case", ["logits", "vision", "images"])
def test_calls_that_are_openrlhfs(case: str) -> None:
    b = batch()
    report = patch.openrlhf()
    made = actor(temperature=0.7)
    if case == "logits":  # OpenRLHF's are float32 and scaled
        output = made(b.sequences, attention_mask=b.attention, return_output=True)
        raw = made.model(b.sequences, None, made.model.calls[0]["position_ids"])["logits"]
        torch.testing.assert_close(output["logits"], raw / 0.7)
    elif case == "vision":  # whose position ids are the model's to make
        made.is_vlm = True
        with pytest.raises(AttributeError, match="unsqueeze"):
            made(b.sequences, b.action, b.attention)
    else:
        with pytest.raises(TypeError, match="pixel_values"):
            made(b.sequences, b.action, b.attention, pixel_values=1)
    usage = report.usage[TARGET]
    assert usage.calls == 0
    assert (usage.handed_on == 1) == (case == "logits")  # the others have raised


def test_errors_of_the_model_are_the_models() -> None:
    b = batch()
    patch.openrlhf()
    made = actor()
    made.model.forward = lambda *_, **__: (_ for _ in ()).throw(ValueError("of the model"))
    with pytest.raises(ValueError, match="of the model"):
        made(b.sequences, b.action, b.attention)
