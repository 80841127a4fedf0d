"""What the losses take: any dtype that loses nothing, no term that is not read, batches where nothing counts, and
anything at all under a mask. Every built-in loss goes through each of these."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Final, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import losses, recipes
from fastreward._arguments.options import Aggregation
from fastreward.language.define import Definition, Loss
from fastreward.language.node import Level
from fastreward.language.terms import TERMS

ROWS, WIDTH, VOCAB, HIDDEN = 6, 7, 5, 3
SHAPE = (ROWS, WIDTH)
GROUPS = [0, 0, 1, 1, 2, 0]
#: Of group 1 nothing counts, and nothing of the last sequence.
MASK = (torch.arange(WIDTH) < torch.tensor([7, 4, 0, 0, 1, 0]).unsqueeze(-1)) & (torch.arange(WIDTH) != 2)
ARGUMENTS: Final = {"ref_logprob": "ref_logprobs", "rollout_logprob": "rollout_logprobs", "weight": "weights"}


@pytest.fixture(params=["cpu", "reference"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with fr.backend(request.param):
        yield


def built_in(*, pairs: bool) -> dict[str, Loss]:
    """Every loss of the package, with a number for what has no default."""
    found = {}
    for name in losses.__all__:
        definition = getattr(losses, name)
        if isinstance(definition, Definition) and definition.pairs == pairs:
            needed = [p.name for p in inspect.signature(definition).parameters.values() if p.default is p.empty]
            found[name] = definition(**dict.fromkeys(needed, 0.5))
    return found


POLICY, PAIRS = built_in(pairs=False), built_in(pairs=True)


def asked(loss: Loss) -> list[tuple[str, Level, int]]:
    """(name, level, side) of what the loss asks for."""
    terms = loss.terms()
    loss.trace(terms)
    return [x for x in terms.graph.inputs() if not x[0].startswith("parameter.")]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def of_policy(loss: Loss) -> dict[str, Any]:
    """Arguments of `policy_loss` with all that the loss asks for."""
    logprobs = -2 * some(*SHAPE)
    given: dict[str, Any] = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.4 * some(*SHAPE, seed=1) - 0.2,
        "advantages": torch.tensor([1.0, -0.5, 2.0, 0.3, -1.0, 0.2]),
        "mask": MASK,
        "entropy": some(*SHAPE, seed=2),
        "ref_logprobs": logprobs - 0.2 * some(*SHAPE, seed=3),
        "group_ids": GROUPS,
        "extra": {},
    }
    for k, (name, level, _) in enumerate(asked(loss)):
        value = some(*SHAPE, seed=4 + k) if level == Level.TOKEN else some(ROWS, seed=4 + k)
        if name in ARGUMENTS:
            given.setdefault(ARGUMENTS[name], value)
        elif name not in TERMS:
            given["extra"][name] = value
    return given


def poisoned(x: Tensor, value: float, counted: Tensor = MASK) -> Tensor:
    """`x`, one per token or per sequence, with `value` where nothing counts."""
    return x.masked_fill(~counted, value) if x.shape == counted.shape else x.masked_fill(~counted.any(-1), value)


def packed(given: Mapping[str, Any]) -> dict[str, Any]:
    def flat(x: Any) -> Any:
        return x.flatten() if isinstance(x, Tensor) and x.shape == SHAPE else x

    moved = {name: flat(x) for name, x in given.items()}
    moved["extra"] = {name: flat(x) for name, x in given["extra"].items()}
    return {**moved, "cu_seqlens": torch.arange(ROWS + 1) * WIDTH}


def run(given: Mapping[str, Any], leaves: tuple[str, ...] = ("logprobs", "entropy"), **options: Any) -> list[Tensor]:
    """Loss, token losses, metrics, gradients."""
    own = {name: given[name].clone().requires_grad_() for name in leaves}
    result = fr.policy_loss(**{**given, **own}, return_token_loss=True, **options)
    grads = torch.autograd.grad(result.loss, list(own.values()), allow_unused=True, materialize_grads=True)
    assert result.token_loss is not None
    return [result.loss.detach(), result.token_loss, result.metrics.values_tensor, *grads]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x.reshape(-1), y.reshape(-1)), (x, y)


# -------------------------------------------------------------------------------------------------- under the mask
@pytest.mark.usefixtures("_backend")
class TestUnderTheMask:
    """NaN and infinities there change no bit of the loss, of a metric or of a gradient."""

    @pytest.mark.parametrize("name", POLICY)
    def test_every_policy_loss(self, name: str) -> None:
        self.check(POLICY[name], {})

    @pytest.mark.parametrize("aggregation", get_args(Aggregation))
    @pytest.mark.parametrize("loss", [losses.ppo(), losses.gspo(), losses.real()], ids=lambda x: x.name)
    def test_every_aggregation(self, loss: Loss, aggregation: str) -> None:
        options = {"aggregation": aggregation, "kl": "k3-corrected", "kl_coef": 0.1, "entropy_coef": 0.1}
        self.check(loss, options)

    def check(self, loss: Loss, options: dict[str, Any]) -> None:
        given = of_policy(loss)
        given.setdefault("weights", some(*SHAPE, seed=20))
        for layout in (dict, packed):
            clean = run(layout(given), loss=loss, **options)
            assert clean[0].isfinite()
            for value in (torch.nan, torch.inf, -torch.inf):
                bad = {k: poisoned(x, value) if isinstance(x, Tensor) and k != "mask" else x for k, x in given.items()}
                bad["extra"] = {k: poisoned(x, value) for k, x in given["extra"].items()}
                same(run(layout(bad), loss=loss, **options), clean)
                bad["advantages"] = poisoned(given["advantages"].unsqueeze(-1).expand(SHAPE), value)
                bad["weights"] = poisoned(some(ROWS, seed=21), value)
                good = {**given, "advantages": given["advantages"].unsqueeze(-1).expand(SHAPE)}
                good["weights"] = some(ROWS, seed=21)
                same(run(layout(bad), loss=loss, **options), run(layout(good), loss=loss, **options))

    @pytest.mark.parametrize("name", PAIRS)
    def test_every_preference_loss(self, name: str) -> None:
        given, counted = of_pairs(PAIRS[name])
        clean = run_pairs(given, PAIRS[name])
        for value in (torch.nan, torch.inf, -torch.inf):
            bad = {}
            for argument, x in given.items():
                bad[argument] = (
                    {k: hidden(k, y, counted, argument, value) for k, y in x.items()}
                    if isinstance(x, dict)
                    else hidden(argument, x, counted, argument, value)
                )
            same(run_pairs(bad, PAIRS[name]), clean)

    @pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
    def test_correction(self, level: Any) -> None:
        old = -2 * some(*SHAPE)
        rollout = old + 0.2 * some(*SHAPE, seed=1)
        options = {"level": level, "mode": "mask", "reject": {"token_k1": 1.5, "seq_max_k3": 0.4}}
        for layout, more in ((lambda x: x, {}), (torch.flatten, {"cu_seqlens": torch.arange(ROWS + 1) * WIDTH})):
            weights, keep, metrics = fr.correction_weights(
                *map(layout, (old, rollout, MASK)), batch_normalize=True, **options, **more
            )
            for value in (torch.nan, torch.inf, -torch.inf):
                bad = (poisoned(old, value), poisoned(rollout, -value), MASK)
                again = fr.correction_weights(*map(layout, bad), batch_normalize=True, **options, **more)
                same([*again[:2], again[2].values_tensor], [weights, keep, metrics.values_tensor])


def of_pairs(loss: Loss) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(arguments of `preference_loss`, what counts of each side); the sides differ in length, one pair is empty."""
    given: dict[str, Any] = {"group_ids": GROUPS, "extra": {}, "chosen_extra": {}, "rejected_extra": {}}
    counted = {}
    for k, (side, width) in enumerate((("chosen", 7), ("rejected", 4))):
        lengths = torch.tensor([width, 3, 0, 1, 2, 2 * k])  # of the last pair one side
        counted[side] = (torch.arange(width) < lengths.unsqueeze(-1)) & (torch.arange(width) != 1)
        given[f"{side}_logprobs"] = -2 * some(ROWS, width, seed=k)
        given[f"ref_{side}_logprobs"] = given[f"{side}_logprobs"] + 0.2 * some(ROWS, width, seed=2 + k)
        given[f"{side}_mask"] = counted[side]
    for k, (name, level, side_number) in enumerate(asked(loss)):
        side = ("chosen", "rejected")[side_number]
        if name in ("logprob", "ref_logprob"):
            continue
        if level != Level.TOKEN:
            given["extra"][name] = some(ROWS, seed=4 + k)
        elif name == "weight":
            given[f"{side}_weights"] = some(*counted[side].shape, seed=4 + k)
        else:
            given[f"{side}_extra"][name] = some(*counted[side].shape, seed=4 + k)
    return given, counted


def hidden(name: str, x: Any, counted: dict[str, Tensor], argument: str, value: float) -> Any:
    """`x` with `value` where nothing of its side, or of the pair, counts."""
    if not isinstance(x, Tensor) or "mask" in name:
        return x
    sides = [c for side, c in counted.items() if side in argument]
    if sides:
        return poisoned(x, value, sides[0])
    either = torch.stack([c.any(-1) for c in counted.values()]).any(0)
    return x.masked_fill(~either, value)


def run_pairs(given: Mapping[str, Any], loss: Loss, **options: Any) -> list[Tensor]:
    leaves = [given[f"{side}_logprobs"].clone().requires_grad_() for side in ("chosen", "rejected")]
    own = {"chosen_logprobs": leaves[0], "rejected_logprobs": leaves[1]}
    result = fr.preference_loss(**{**given, **own}, loss=loss, return_pair_loss=True, **options)
    grads = torch.autograd.grad(result.loss, leaves, allow_unused=True, materialize_grads=True)
    assert result.token_loss is not None
    return [result.loss.detach(), result.token_loss, result.metrics.values_tensor, *grads]


# --------------------------------------------------------------------------------------------- NaN where it counts
@pytest.mark.usefixtures("_backend")
class TestNanIsAnError:
    """Whatever argument it is in, by name and index, wherever it has reached the loss or a metric."""

    @pytest.mark.parametrize("layout", [dict, packed], ids=["padded", "packed"])
    @pytest.mark.parametrize(
        ("argument", "index"),
        [
            *((name, (1, 3)) for name in ("logprobs", "old_logprobs", "ref_logprobs", "weights", "entropy", "gate")),
            ("advantages", (4,)),
            ("scale", (4,)),
        ],
    )
    def test_policy_loss(self, argument: str, index: tuple[int, ...], layout: Any) -> None:
        @losses.define
        def gated(t: Any) -> Any:
            return -t.advantage * t.ratio * t.extra("gate") * t.extra("scale", per="sequence")

        given = {**of_policy(gated()), "weights": some(*SHAPE)}
        inside = given["extra"] if argument in given["extra"] else given
        inside[argument] = inside[argument].clone()
        inside[argument][index] = torch.nan
        name = argument if argument in given else rf"extra\['{argument}'\]"
        at = index if layout is dict or len(index) == 1 else (index[0] * WIDTH + index[1],)
        place = ", ".join(map(str, at))
        with pytest.raises(
            ValueError, match=rf"{name}: expected numbers where mask is set, got nan at index \[{place}\]"
        ):
            fr.policy_loss(**layout(given), loss=gated(), entropy_coef=0.1)

    @pytest.mark.parametrize("loss", [losses.ppo(), losses.gspo()], ids=["fused", "in two passes"])
    def test_logits_and_hidden_states(self, loss: Loss) -> None:
        logits, labels = torch.randn(*SHAPE, VOCAB), torch.zeros(SHAPE).long()
        logits[1, 3], logits[0, 2] = torch.nan, torch.nan  # the latter under the mask
        rest = (labels, -some(*SHAPE), torch.ones(ROWS), MASK)
        with pytest.raises(ValueError, match=r"logits: expected numbers where mask is set, got nan at index \[1, 3\]"):
            fr.logits_policy_loss(logits.requires_grad_(), *rest, loss=loss)
        with pytest.raises(ValueError, match=r"hidden: expected numbers where mask is set, got nan at index \[1, 3\]"):
            fr.linear_policy_loss(logits, torch.randn(4, VOCAB).requires_grad_(), *rest, loss=loss)

    @pytest.mark.parametrize("argument", ["chosen_logprobs", "ref_rejected_logprobs", "rejected_weights", "extra"])
    def test_preference_loss(self, argument: str) -> None:
        @losses.define(pairs=True)
        def weighed(t: Any) -> Any:
            margin = losses.seq_sum(t.chosen.log_ratio) - losses.seq_sum(t.rejected.log_ratio * t.rejected.weight)
            return -losses.logsigmoid(margin) * t.extra("factor")

        given, _ = of_pairs(weighed())
        x = given["extra"]["factor"] if argument == "extra" else given[argument]
        x[(1, 0)[: x.ndim]] = torch.nan
        name = r"extra\['factor'\]" if argument == "extra" else argument
        with pytest.raises(ValueError, match=rf"{name}: expected numbers where mask is set, got nan at index \[1"):
            fr.preference_loss(**given, loss=weighed())


# ------------------------------------------------------------------------------------------- nothing that counts
@pytest.mark.usefixtures("_backend")
class TestNothingCounts:
    """empty="zero": a loss of 0 whose gradients are zeros that flow; otherwise an error that says so."""

    @pytest.mark.parametrize("name", POLICY)
    def test_every_policy_loss(self, name: str) -> None:
        given = {**of_policy(POLICY[name]), "mask": torch.zeros_like(MASK)}
        given = {
            k: poisoned(x, torch.nan, ~MASK & MASK) if isinstance(x, Tensor) and k != "mask" else x
            for k, x in given.items()
        }
        for layout in (dict, packed):
            self.check_zero(layout(given), POLICY[name])
            with pytest.raises(ValueError, match=r'mask: expected at least one counted token, .*empty="zero"'):
                run(layout(given), loss=POLICY[name])

    @pytest.mark.parametrize("aggregation", get_args(Aggregation))
    def test_every_aggregation(self, aggregation: str) -> None:
        given = {**of_policy(losses.ppo()), "mask": torch.zeros_like(MASK)}
        options = {"aggregation": aggregation, "entropy_coef": 0.1, "kl": "k3", "kl_coef": 0.1}
        self.check_zero(given, losses.ppo(), **options)

    def check_zero(self, given: Mapping[str, Any], loss: Loss, **options: Any) -> None:
        value, token_loss, metrics, *grads = run(given, loss=loss, empty="zero", **options)
        assert value == 0
        assert not token_loss.any()
        assert metrics.isnan().sum() == len(metrics) - 1, "all but the count"
        assert not any(g.any() for g in grads)

    @pytest.mark.parametrize("name", PAIRS)
    def test_every_preference_loss(self, name: str) -> None:
        given, _ = of_pairs(PAIRS[name])
        given |= {k: torch.zeros_like(x) for k, x in given.items() if k.endswith("mask")}
        value, pair_loss, _, *grads = run_pairs(given, PAIRS[name], empty="zero")
        assert value == 0
        assert not pair_loss.any()
        assert not any(g.any() for g in grads)
        with pytest.raises(ValueError, match=r'chosen_mask, rejected_mask: .*empty="zero"'):
            run_pairs(given, PAIRS[name])

    @pytest.mark.parametrize("loss", [losses.ppo(), losses.gspo()], ids=["fused", "in two passes"])
    def test_from_logits_and_hidden_states(self, loss: Loss) -> None:
        labels, nothing = torch.zeros(SHAPE).long(), torch.zeros_like(MASK)
        rest = (labels, -some(*SHAPE), torch.ones(ROWS), nothing)
        logits = torch.randn(*SHAPE, VOCAB).requires_grad_()
        hidden, head = torch.randn(*SHAPE, HIDDEN).requires_grad_(), torch.randn(VOCAB, HIDDEN).requires_grad_()
        for entry, leaves in ((fr.logits_policy_loss, [logits]), (fr.linear_policy_loss, [hidden, head])):
            result = entry(*leaves, *rest, loss=loss, empty="zero")
            assert result.loss == 0
            assert not any(g.any() for g in torch.autograd.grad(result.loss, leaves))
            assert result.metrics["token_count"] == 0
            with pytest.raises(ValueError, match='empty="zero"'):
                entry(*leaves, *rest, loss=loss)

    def test_its_name(self) -> None:
        with pytest.raises(ValueError, match="empty: expected one of 'raise', 'zero', got 'skip'"):
            fr.policy_loss(**of_policy(losses.ppo()), empty="skip")


# ----------------------------------------------------------------------------------------------- what is not read
@pytest.mark.usefixtures("_backend")
class TestTermsThatAreNotRead:
    @pytest.mark.parametrize("name", POLICY)
    def test_advantages_and_old_logprobs(self, name: str) -> None:
        """None changes nothing where the loss reads none, and is refused by name where it does."""
        loss = POLICY[name]
        given = of_policy(loss)
        for argument, term in (("advantages", "advantage"), ("old_logprobs", "old_logprob")):
            without = {**given, argument: None}
            if loss.reads(term):
                with pytest.raises(ValueError, match=rf"{name} reads the term '{term}', .* pass {argument}="):
                    run(without, loss=loss)
                continue
            found, expected = run(without, loss=loss), run(given, loss=loss)
            same(found[:2] + found[3:], expected[:2] + expected[3:])
            absent = set(fr.policy_loss(**given, loss=loss).metrics) - set(fr.policy_loss(**without, loss=loss).metrics)
            measured = {"kl_old_k1", "kl_old_k3", "ratio_mean", "ratio_min", "ratio_max"}
            assert absent == (measured if argument == "old_logprobs" else set())

    def test_through_every_entry_and_its_messages(self) -> None:
        logits, labels = torch.randn(*SHAPE, VOCAB).requires_grad_(), torch.zeros(SHAPE).long()
        hidden, head = torch.randn(*SHAPE, HIDDEN).requires_grad_(), torch.randn(VOCAB, HIDDEN)
        for call in (
            lambda **o: fr.logits_policy_loss(logits, labels, None, None, MASK, **o),
            lambda **o: fr.linear_policy_loss(hidden, head, labels, None, None, MASK, **o),
        ):
            result = call(loss=losses.sft())
            assert list(result.metrics) == ["token_count"]
            result.loss.backward()
            with pytest.raises(ValueError, match="ppo reads the term 'old_logprob', which was not passed"):
                call()
        with pytest.raises(ValueError, match="old_logprobs: needed for kl='k3-corrected'"):
            fr.policy_loss(-some(*SHAPE), None, None, loss=losses.sft(), kl="k3-corrected", ref_logprobs=-some(*SHAPE))

    def test_recipes(self) -> None:
        logprobs = -some(*SHAPE)
        assert list(recipes.sft(logprobs, MASK).metrics) == ["token_count"]
        distilled = recipes.sdpo(logprobs, logprobs, -some(*SHAPE, seed=1), MASK)
        assert "ratio_mean" in distilled.metrics


# ----------------------------------------------------------------------------------------------------------- dtypes
#: Exact in float32: what is lost is lost before.
EXACT: Final = (torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.usefixtures("_backend")
class TestDtypes:
    @pytest.mark.parametrize("dtype", EXACT, ids=str)
    def test_policy_loss(self, dtype: torch.dtype) -> None:
        """Every argument in any floating dtype, with the bits of float32; gradients come back in the one that came."""
        given = {**of_policy(losses.ppo()), "weights": some(*SHAPE), "extra": {}}
        narrow = {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in given.items()}
        wide = {k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in narrow.items()}
        options = {"loss": losses.ppo(), "kl": "k3", "kl_coef": 0.1, "entropy_coef": 0.1}
        found, expected = run(narrow, **options), run(wide, **options)
        same(found[:3], expected[:3])
        assert found[3].dtype == found[4].dtype == dtype
        same(found[3:], [x.to(dtype) for x in expected[3:]])

    def test_advantages_and_weights_are_any_real_numbers(self) -> None:
        given = of_policy(losses.ppo())
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float64):
            signs = torch.tensor([1, 0, 1, 1, 0, 1]).to(dtype)
            expected = run({**given, "advantages": signs.float(), "weights": signs.float()}, loss=losses.ppo())
            same(run({**given, "advantages": signs, "weights": signs}, loss=losses.ppo()), expected)
        for argument in ("advantages", "weights"):
            with pytest.raises(TypeError, match=f"{argument}: expected real numbers, got complex64"):
                fr.policy_loss(**{**given, argument: torch.zeros(ROWS, dtype=torch.complex64)})
        for argument in ("logprobs", "old_logprobs", "ref_logprobs", "entropy"):
            with pytest.raises(TypeError, match=f"{argument}: expected floating-point numbers, got int64"):
                fr.policy_loss(**{**given, argument: torch.zeros(SHAPE).long()})

    @pytest.mark.parametrize("dtype", EXACT, ids=str)
    def test_from_logits_preferences_and_correction(self, dtype: torch.dtype) -> None:
        old, rollout = (-some(*SHAPE, seed=k).to(dtype) for k in (0, 1))
        logits, labels = torch.randn(*SHAPE, VOCAB), torch.zeros(SHAPE).long()
        advantages = torch.ones(ROWS)
        calls = (
            lambda o, r: fr.logits_policy_loss(logits, labels, o, advantages, MASK, ref_logprobs=r).metrics,
            lambda o, r: fr.linear_policy_loss(logits, torch.eye(VOCAB), labels, o, advantages, MASK).metrics,
            lambda o, r: fr.preference_loss(o, r, ref_chosen_logprobs=r, ref_rejected_logprobs=o).metrics,
            lambda o, r: fr.correction_weights(o, r, MASK)[2],
        )
        for call in calls:
            assert torch.equal(call(old, rollout).values_tensor, call(old.float(), rollout.float()).values_tensor)
        kept = fr.off_policy_sequence_mask(old, rollout, -advantages.to(dtype), MASK, threshold=0.1)
        assert torch.equal(
            kept, fr.off_policy_sequence_mask(old.float(), rollout.float(), -advantages, MASK, threshold=0.1)
        )
        leaves = [old.clone().requires_grad_(), rollout.clone().requires_grad_()]
        fr.preference_loss(*leaves, ref_chosen_logprobs=rollout, ref_rejected_logprobs=old).loss.backward()
        assert all(x.grad is not None and x.grad.dtype == dtype for x in leaves)

    def test_numpy_s_default(self) -> None:
        generator = np.random.default_rng(0)
        logprobs, old = -generator.random(SHAPE), -generator.random(SHAPE)
        assert logprobs.dtype == np.float64
        result = fr.policy_loss(logprobs, old, generator.random(ROWS), MASK.numpy(), ref_logprobs=old)
        assert isinstance(result.loss, np.ndarray)
        assert result.loss.dtype == np.float32
        assert fr.correction_weights(old, logprobs)[0].dtype == np.float32


# ----------------------------------------------------------------------------------------------------------- width
def test_the_width_that_sum_norm_divides_by() -> None:
    """The same tokens in wider padding: half the loss, unless a normalizer says by what to divide."""
    given = of_policy(losses.ppo())
    wider = {
        k: torch.nn.functional.pad(x, (0, WIDTH)) if getattr(x, "shape", ()) == SHAPE else x for k, x in given.items()
    }
    options = {"loss": losses.ppo(), "aggregation": "seq-mean-token-sum-norm"}
    narrow, wide = (fr.policy_loss(**x, **options).loss for x in (given, wider))
    torch.testing.assert_close(wide, narrow / 2)
    narrow, wide = (fr.policy_loss(**x, **options, normalizer=3.0 * WIDTH).loss for x in (given, wider))
    torch.testing.assert_close(wide, narrow)
    assert "normalizer" in str(fr.policy_loss.__doc__).split("seq-mean-token-sum-norm")[1].split("group-mean")[0]
