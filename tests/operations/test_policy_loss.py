"""policy_loss against the float64 reference and verl's written-out vanilla loss: values, gradients, bits, messages."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from criterion import MASK_DTYPES, assert_as_good_as_torch
from torch import Tensor

import fastreward as fr
from fastreward._arguments.options import AGGREGATIONS, KLS
from fastreward._runtime.layout import METRICS
from fastreward.reference.policy_loss import policy_loss as truth_of

BACKENDS = ["cpu", "reference"]


def batch(rows: int = 6, width: int = 37, spread: float = 0.4) -> dict[str, Tensor]:
    old = -torch.rand(rows, width) * 3
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1))
    mask[0] = False  # a sequence without a counted token
    return {
        "logprobs": old + torch.randn(rows, width) * spread,
        "old_logprobs": old,
        "advantages": torch.randn(rows, width),
        "mask": mask & (torch.rand(rows, width) > 0.2),
    }


def check(data: dict[str, Tensor], loss: Any = None, *, entropy: Tensor | None = None, **options: Any) -> fr.PolicyLoss:
    """Loss, metrics, token losses and gradients (upstream gradient 1.7) against the reference in f64 and in f32."""
    settings = loss or fr.losses.ppo()
    own = {**data, "logprobs": data["logprobs"].clone().requires_grad_()}
    extra = {} if entropy is None else {"entropy": entropy.clone().requires_grad_()}
    result = fr.policy_loss(**own, loss=settings, return_token_loss=True, **extra, **options)
    (result.loss * 1.7).backward()

    def reference(dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        leaf = data["logprobs"].detach().to(dtype).requires_grad_()
        more = {} if entropy is None else {"entropy": entropy.detach().to(dtype).requires_grad_()}
        clip = dict(settings.parameters)
        out = truth_of(**{**data, "logprobs": leaf}, **clip, **more, **options)
        (out[0] * 1.7).backward()
        return out, {"logprobs": leaf.grad, **{name: x.grad for name, x in more.items()}}

    truth, grads = reference(torch.float64)
    assert_as_good_as_torch(result.loss, truth[0], truth[0], "loss")
    assert_as_good_as_torch(result.token_loss, truth[1], truth[1], "token_loss")
    assert set(result.metrics) == set(truth[2])
    for name in truth[2]:
        assert_as_good_as_torch(result.metrics[name], truth[2][name], truth[2][name], name)
    assert_as_good_as_torch(own["logprobs"].grad, grads["logprobs"], grads["logprobs"], "gradient")
    if entropy is not None:
        expected = grads["entropy"]
        if expected is not None:
            assert_as_good_as_torch(extra["entropy"].grad, expected, expected, "entropy gradient")
    return result


def grouped(aggregation: str, rows: int = 6) -> dict[str, Tensor]:
    """group_ids, where the aggregation asks for them."""
    return {"group_ids": torch.tensor([4, 2, 4, 4, 2, 9])[:rows]} if aggregation == "group-mean" else {}


@pytest.fixture(params=BACKENDS)
def _backend(request: pytest.FixtureRequest):
    with fr.backend(request.param):
        yield


@pytest.mark.usefixtures("_backend")
class TestNumbers:
    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    @pytest.mark.parametrize("kl", [None, *KLS])
    def test_every_aggregation_and_kl(self, aggregation: str, kl: str | None) -> None:
        data = batch()
        ref = data["old_logprobs"] + torch.randn(data["old_logprobs"].shape) * 0.3
        check(
            data,
            aggregation=aggregation,
            **grouped(aggregation),
            kl=kl,
            kl_coef=0.05 if kl else 0.0,
            ref_logprobs=ref,
            entropy=torch.rand(data["logprobs"].shape),
            entropy_coef=0.01,
        )

    @pytest.mark.parametrize(
        "loss",
        [
            fr.losses.ppo(0.1, 0.28),
            fr.losses.ppo(dual_clip=3.0),
            fr.losses.ppo(delta=1.3),
            fr.losses.ppo(0.2, 0.5, delta=1.1),
            fr.losses.ppo(0.2, 0.3, dual_clip=1.5, delta=2.0, log_ratio_clamp=0.3),
            fr.losses.ppo(log_ratio_clamp=None),
        ],
        ids=["clip-higher", "dual", "delta", "delta-inside", "all", "no-clamp"],
    )
    def test_every_clip(self, loss: fr.losses.Loss) -> None:
        check(batch(spread=0.8), loss)

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_normalizer_weights_and_sequence_advantages(self, aggregation: str) -> None:
        data = batch()
        data["advantages"] = torch.randn(6)
        weights = torch.rand(6, 37) * 2
        check(data, aggregation=aggregation, **grouped(aggregation), normalizer=123.0, weights=weights)

    @pytest.mark.parametrize("dtype", MASK_DTYPES)
    def test_mask_dtypes(self, dtype: torch.dtype) -> None:
        data = batch()
        data["mask"] = data["mask"].to(dtype)
        check(data)

    def test_no_mask(self) -> None:
        data = batch()
        del data["mask"]
        check(data)

    def test_exactly_at_the_clip_edges_and_zero_advantage(self) -> None:
        """Ratios on both edges, A of both signs and 0: the gradient's branch must be the reference's."""
        low, high = 0.5, 1.0
        edges = torch.tensor([0.5, 1.0, 2.0]).log()
        rows = list(itertools.product(edges.tolist(), [-1.0, 0.0, 1.0]))
        lp = torch.tensor([[e for e, _ in rows]])
        data = {
            "logprobs": lp,
            "old_logprobs": torch.zeros_like(lp),
            "advantages": torch.tensor([[a for _, a in rows]]),
        }
        leaf = lp.clone().requires_grad_()
        result = fr.policy_loss(leaf, data["old_logprobs"], data["advantages"], loss=fr.losses.ppo(low, high))
        result.loss.backward()
        assert torch.isfinite(leaf.grad).all()
        assert not leaf.grad[data["advantages"] == 0].any()
        truth = truth_of(lp, data["old_logprobs"], data["advantages"], clip_low=low, clip_high=high)
        assert torch.allclose(result.loss.double(), truth[0], atol=1e-6)

    def test_extreme_log_ratios(self) -> None:
        data = batch()
        data["logprobs"] = data["old_logprobs"] + torch.randn(6, 37) * 60
        check(data, fr.losses.ppo(dual_clip=3.0))

    def test_what_lies_under_the_mask_leaks_nowhere(self) -> None:
        data = batch()
        clean = check(data, entropy=torch.rand(6, 37), entropy_coef=0.1)
        dirty = {k: v.clone() for k, v in data.items()}
        for i, name in enumerate(("logprobs", "old_logprobs", "advantages")):
            dirty[name][~data["mask"]] = (torch.nan, torch.inf, -torch.inf)[i]
        entropy = torch.rand(6, 37)
        entropy[~data["mask"]] = torch.nan
        leaf, entropy = dirty["logprobs"].requires_grad_(), entropy.requires_grad_()
        result = fr.policy_loss(**dirty, entropy=entropy, entropy_coef=0.1, aggregation="seq-mean-token-mean")
        result.loss.backward()
        assert torch.isfinite(result.loss)
        assert torch.isfinite(result.metrics.values_tensor).all()
        assert not leaf.grad[~data["mask"]].any()
        assert not entropy.grad[~data["mask"]].any()
        assert torch.isfinite(clean.loss)

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_packed_equals_padded(self, aggregation: str) -> None:
        data = batch(5, 29)
        lengths = torch.tensor([3, 0, 29, 1, 12])
        inside = torch.arange(29) < lengths.unsqueeze(1)
        data["mask"] = inside & (torch.rand(5, 29) > 0.3)
        data["mask"][2, 0] = True
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        padded, packed = data["logprobs"].clone().requires_grad_(), data["logprobs"][inside].clone().requires_grad_()
        options = {"aggregation": aggregation, **grouped(aggregation, 5)}
        a = fr.policy_loss(padded, data["old_logprobs"], data["advantages"], data["mask"], **options)
        b = fr.policy_loss(
            packed,
            data["old_logprobs"][inside],
            data["advantages"][inside],
            data["mask"][inside],
            **options,
            cu_seqlens=bounds.int(),
            return_token_loss=True,
        )
        a.loss.backward()
        b.loss.backward()
        assert torch.allclose(a.loss, b.loss, atol=1e-6)
        assert torch.allclose(padded.grad[inside], packed.grad, atol=1e-7)
        per_sequence = fr.policy_loss(
            packed, data["old_logprobs"][inside], data["advantages"][:, 0], data["mask"][inside], cu_seqlens=bounds
        )
        expected = fr.policy_loss(padded, data["old_logprobs"], data["advantages"][:, 0], data["mask"])
        assert torch.allclose(per_sequence.loss, expected.loss, atol=1e-6)

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (4, 1), (1, 70_000)])
    def test_odd_shapes(self, shape: tuple[int, int]) -> None:
        lp, advantages = torch.randn(shape, requires_grad=True), torch.randn(shape)
        old = lp.detach() - 0.1 * torch.rand(shape)
        result = fr.policy_loss(lp, old, advantages)
        (grad,) = torch.autograd.grad(result.loss, lp)
        assert grad.shape == shape
        if not lp.numel():
            assert result.loss == 0
            return
        leaf = lp.detach().double().requires_grad_()
        truth = truth_of(leaf, old, advantages)[0]
        assert_as_good_as_torch(result.loss, truth, truth, "loss")
        (exact,) = torch.autograd.grad(truth, leaf)
        assert_as_good_as_torch(grad * lp.numel(), exact * lp.numel(), exact * lp.numel(), "gradient")

    def test_keep_drops_sequences_and_tokens(self) -> None:
        data = batch()
        keep = torch.tensor([1, 1, 0, 1, 0, 1])
        kept = fr.policy_loss(**data, keep=keep)
        masked = fr.policy_loss(**{**data, "mask": data["mask"] & (keep == 1).unsqueeze(1)})
        assert torch.equal(kept.loss, masked.loss)
        tokens = torch.rand(6, 37) > 0.5
        assert torch.equal(
            fr.policy_loss(**data, keep=tokens).loss, fr.policy_loss(**{**data, "mask": data["mask"] & tokens}).loss
        )


def verl_vanilla(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    """verl's vanilla loss, written out: clamp 20, clip 0.2, dual clip 3, token-mean."""
    ratio = (lp - old).clamp(-20, 20).exp()
    clipped = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    token = torch.where(adv < 0, torch.minimum(-adv * 3.0, clipped), clipped)
    return (token * mask).sum() / mask.sum()


def test_equals_verls_vanilla_loss() -> None:
    data = batch(8, 50, spread=1.0)
    ours, theirs = (data["logprobs"].clone().requires_grad_() for _ in range(2))
    result = fr.policy_loss(
        ours, data["old_logprobs"], data["advantages"], data["mask"], loss=fr.losses.ppo(dual_clip=3.0)
    )
    expected = verl_vanilla(theirs, data["old_logprobs"], data["advantages"], data["mask"].float())
    result.loss.backward()
    expected.backward()
    assert torch.allclose(result.loss, expected, atol=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-8)


class TestBits:
    @pytest.mark.usefixtures("threads")
    def test_threads_and_right_padding(self) -> None:
        data = batch(64, 500)
        ref = data["old_logprobs"] * 0.9

        def run(d: dict[str, Tensor], r: Tensor) -> tuple[Tensor, ...]:
            leaf = d["logprobs"].clone().requires_grad_()
            out = fr.policy_loss(**{**d, "logprobs": leaf}, ref_logprobs=r, kl="k3", kl_coef=0.1)
            out.loss.backward()
            return out.loss.detach(), out.metrics.values_tensor, leaf.grad

        first = run(data, ref)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for a, b in zip(first, run(data, ref), strict=True):
                assert torch.equal(a, b)
        wide = {k: torch.nn.functional.pad(v, (0, 77)) for k, v in data.items()}
        padded = run(wide, torch.nn.functional.pad(ref, (0, 77)))
        assert torch.equal(first[0], padded[0])
        assert torch.equal(first[1], padded[1])
        assert torch.equal(first[2], padded[2][:, :500])

    def test_permuted_sequences_keep_their_gradient_bits(self) -> None:
        data = batch(32, 100)
        order = torch.randperm(32)
        grads = []
        for d in (data, {k: v[order] for k, v in data.items()}):
            leaf = d["logprobs"].clone().requires_grad_()
            fr.policy_loss(**{**d, "logprobs": leaf}, aggregation="seq-mean-token-mean").loss.backward()
            grads.append(leaf.grad)
        assert torch.equal(grads[0][order], grads[1])


class TestMessages:
    @pytest.mark.parametrize(
        ("error", "message", "change"),
        [
            (
                ValueError,
                r"old_logprobs: expected shape \[6, 37\].*got \[37, 6\]",
                {"old_logprobs": torch.zeros(37, 6)},
            ),
            (ValueError, r"advantages: expected shape \[6, 37\] .*or \[6\].*got \[5\]", {"advantages": torch.zeros(5)}),
            (
                TypeError,
                r"logprobs: expected floating-point numbers, got int64",
                {"logprobs": torch.zeros(6, 37).long()},
            ),
            (ValueError, r"keep: expected a tensor on cpu, where logprobs is", {"keep": torch.ones(6, device="meta")}),
            (TypeError, r"mask: expected a torch tensor", {"mask": [[1.0] * 37] * 6}),
            (ValueError, r"mask: expected shape \[6, 37\] \(as logprobs\)", {"mask": torch.zeros(6)}),
            (TypeError, r"normalizer: expected a positive number, got 'ten'", {"normalizer": "ten"}),
            (
                ValueError,
                r"mask: expected at least one counted token, got an all-zero mask",
                {"mask": torch.zeros(6, 37)},
            ),
            (ValueError, r"aggregation: expected one of.*did you mean 'token-mean'", {"aggregation": "token_mean"}),
            (ValueError, r"kl: expected one of 'k1', 'abs', 'k2', 'k3'.*, got 'k4'", {"kl": "k4"}),
            (ValueError, r"ref_logprobs: needed for kl='k3'", {"kl": "k3"}),
            (ValueError, r"kl: expected one of 'k1'.* where kl_coef is not 0", {"kl_coef": 0.1}),
            (ValueError, r"entropy: needed where entropy_coef is not 0", {"entropy_coef": 0.1}),
            (
                TypeError,
                r"loss: expected a loss such as .*, got str; write losses.ppo\(\)",
                {"loss": "ppo"},
            ),
            (
                TypeError,
                r"no loss for .* has that name \(near: .*losses.gspo\(\).*`fastreward recipes grpo`",
                {"loss": "grpo"},
            ),
            (TypeError, r"has that name; published methods: `fastreward recipes qqqqqq`", {"loss": "qqqqqq"}),
            (TypeError, r"gspo is a recipe: call it .*, or pass losses.gspo\(\)$", {"loss": fr.recipes.gspo}),
            (TypeError, r"grpo_loss is a recipe: call it .* operation$", {"loss": fr.recipes.grpo_loss}),
            (TypeError, r"got function; decorate a function over terms", {"loss": lambda t: -t.logprob}),
            (
                TypeError,
                r"kl_coef: expected a number, got '0.1'",
                {"kl_coef": "0.1", "kl": "k2", "ref_logprobs": torch.zeros(6, 37)},
            ),
            (
                TypeError,
                r"kl_coef: expected a number, got True",
                {"kl_coef": True, "kl": "k2", "ref_logprobs": torch.zeros(6, 37)},
            ),
            (TypeError, r"advantages: expected a torch tensor .*, got list; write torch.tensor", {"advantages": [1.0]}),
            (TypeError, r"loss: dpo is a loss over pairs", {"loss": fr.losses.dpo()}),
            (ValueError, r"group_ids: expected 6 ids", {"group_ids": [1] * 5, "aggregation": "group-mean"}),
            (ValueError, r"group_ids: aggregation 'group-mean' is over groups", {"aggregation": "group-mean"}),
            (ValueError, r"group_size: expected a positive divisor", {"group_size": 4, "aggregation": "group-mean"}),
            (ValueError, r"extra\['advantage'\]: 'advantage' is a term", {"extra": {"advantage": torch.zeros(6)}}),
            (TypeError, "extra: expected a mapping from terms to tensors or numbers, got list", {"extra": [1.0]}),
            (ValueError, r"normalizer: expected a positive number", {"normalizer": 0.0}),
            (ValueError, r"normalizer: expected a positive number", {"normalizer": torch.tensor(-3.0)}),
            (
                ValueError,
                r"kl_coef: expected a finite number",
                {"kl_coef": float("nan"), "kl": "k3", "ref_logprobs": torch.zeros(6, 37)},
            ),
            (TypeError, r"weights: expected a torch tensor", {"weights": 2.0}),
            (
                ValueError,
                r"cu_seqlens: expected bounds from 0 to 3, got those of no sequence",
                {
                    **dict.fromkeys(("logprobs", "old_logprobs", "advantages"), torch.zeros(3)),
                    "mask": None,
                    "cu_seqlens": torch.tensor([0]),
                },
            ),
            (ValueError, r"cu_seqlens: expected \[B \+ 1\] bounds over packed", {"cu_seqlens": torch.tensor([0, 3])}),
        ],
    )
    def test_message(self, error: type[Exception], message: str, change: dict[str, Any]) -> None:
        with pytest.raises(error, match=message):
            fr.policy_loss(**{**batch(), **change})

    def test_nan_advantage_names_its_place(self) -> None:
        data = batch()
        data["mask"][3, 5] = True
        data["advantages"][3, 5] = torch.nan
        first = [[b, t] for b in range(6) for t in range(37) if data["mask"][b, t] and data["advantages"][b, t].isnan()]
        with pytest.raises(ValueError, match=rf"advantages: .*nan.*\[{first[0][0]}, {first[0][1]}\]"):
            fr.policy_loss(**data)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("packed", [False, True])
    def test_nan_advantage_of_a_sequence(self, packed: bool, backend: str) -> None:
        """It may be NaN where nothing of the sequence counts."""
        data = {**batch(), "advantages": torch.tensor([torch.nan, 1, 2, 3, 4, 5])}
        if packed:
            data = {k: v if k == "advantages" else v.flatten() for k, v in data.items()}
            data["cu_seqlens"] = torch.arange(7) * 37
        with fr.backend(backend):
            assert torch.isfinite(fr.policy_loss(**data).loss)
            data["advantages"][3], data["mask"][-1] = torch.nan, True
            data["mask"].view(6, 37)[3, 0] = True
            with pytest.raises(ValueError, match=r"advantages: expected numbers where mask is set, got nan at"):
                fr.policy_loss(**data)

    def test_an_empty_micro_batch_is_fine_with_a_normalizer(self) -> None:
        data = batch()
        data["mask"][:] = False
        leaf = data["logprobs"].requires_grad_()
        result = fr.policy_loss(**data, normalizer=100.0)
        result.loss.backward()
        assert result.loss == 0
        assert not leaf.grad.any()
        metrics = result.metrics.floats()
        assert metrics.pop("token_count") == 0
        assert all(math.isnan(x) for x in metrics.values()), "there is no token to take them over"

    def test_unknown_metric(self) -> None:
        with pytest.raises(KeyError, match=r"no metric 'kl'; there are clip_fraction_low"):
            fr.policy_loss(**batch()).metrics["kl"]

    def test_clip_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"dual_clip: expected None or a number > 1, got 0\.5"):
            fr.losses.ppo(dual_clip=0.5)
        with pytest.raises(ValueError, match=r"clip_high: expected a number >= 0, got nan"):
            fr.losses.ppo(0.2, torch.nan)


def test_metrics_by_name_and_as_floats() -> None:
    data = batch()
    metrics = fr.policy_loss(
        **data, loss=fr.losses.ppo(dual_clip=3.0), ref_logprobs=data["old_logprobs"], entropy=torch.rand(6, 37)
    ).metrics
    assert list(metrics) == list(METRICS)
    assert metrics.floats()["token_count"] == metrics["token_count"].item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_computed_is_absent(backend: str) -> None:
    """No zero stands for it: no clip fraction without a clip, no KL without a reference, no entropy where unread."""
    data = batch()
    always = ["kl_old_k1", "kl_old_k3", "ratio_mean", "ratio_min", "ratio_max", "token_count"]
    with fr.backend(backend):
        metrics = fr.policy_loss(**data, loss=fr.losses.reinforce()).metrics
        assert list(metrics) == always
        assert len(metrics.values_tensor) == len(always)
        with pytest.raises(KeyError, match=f"no metric 'clip_fraction_low'; there are {', '.join(always)}"):
            metrics["clip_fraction_low"]
        clipped = list(fr.policy_loss(**data).metrics)
        assert clipped == ["clip_fraction_low", "clip_fraction_high", *always]
        logits, labels = torch.randn(6, 37, 5), torch.zeros(6, 37).long()
        rest = (data["old_logprobs"], data["advantages"], data["mask"])
        from_logits = fr.logits_policy_loss(logits, labels, *rest, entropy_coef=0.1).metrics
        assert "entropy_mean" in from_logits
        assert list(fr.logits_policy_loss(logits, labels, *rest).metrics) == clipped


def test_opcheck() -> None:
    data = batch(3, 9)
    levels = tuple((name, 3) for name in ("old_logprob", "advantage", "ref_logprob", "logprob", "entropy"))
    for deferred, backend in ((False, "cpu"), (True, "reference")):
        plan = fr.losses.ppo(dual_clip=3.0).policy_plan(levels, "token-mean", False, False, "k3", True, True, deferred)
        given = {**data, "ref_logprob": data["old_logprobs"] * 0.9}
        given |= {"old_logprob": data["old_logprobs"], "advantage": data["advantages"]}
        arguments = (
            data["logprobs"].detach().requires_grad_(),
            torch.rand(3, 9).requires_grad_(),
            None,
            [given[name] for name, _ in plan[1]],
            data["mask"],
            None,
            None,
            None,
            None,
            [9.0, 0.1, 0.01, 0.2, 0.2, 3.0],
            torch.tensor([9.0, 0.1, 0.01, 0.2, 0.2, 3.0], dtype=torch.float64) if deferred else None,
            plan[0],
            backend,
        )
        torch.library.opcheck(torch.ops.fastreward.objective, arguments)
        _, _, saved, saved_entropy, _, row_weight, *_ = (x.detach() for x in torch.ops.fastreward.objective(*arguments))
        weight = row_weight if deferred else None
        like = data["logprobs"].detach()
        upstream = torch.tensor(1.0)
        for values, own_weight, per_token in ((saved, weight, True), (saved_entropy, None, False)):
            backward = (values, own_weight, upstream, like, data["mask"], None, per_token, backend)
            torch.library.opcheck(torch.ops.fastreward.objective_backward, backward)


def test_second_derivatives_are_refused() -> None:
    data = batch()
    leaf = data["logprobs"].requires_grad_()
    (gradient,) = torch.autograd.grad(fr.policy_loss(**data).loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(gradient.sum(), leaf)


def test_unchecked_bounds_under_compile_touch_nothing_outside() -> None:
    """Traced code checks no values: whatever cu_seqlens says, the kernel stays with the N tokens it was given."""

    def step(lp: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fr.policy_loss(lp, lp.detach(), torch.ones(3), cu_seqlens=cu_seqlens, normalizer=1.0).loss

    lp = torch.zeros(10, requires_grad=True)
    loss = torch.compile(step, backend="eager")(lp, torch.tensor([5, 400_000, -7, 3]))
    (grad,) = torch.autograd.grad(loss, lp)
    assert torch.equal(grad, -torch.ones(10))
    assert loss == -10  # and every token is in one sequence


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("bounds", [[0, 1, 2, 3], [0, 3], [0, 0, 1, 2, 3]])
def test_packed_weights_per_token(bounds: list[int]) -> None:
    """Weights in the shape of the packed tokens are the tokens', also where there are as many sequences."""
    lp, weights = torch.full((3,), -0.5, requires_grad=True), torch.tensor([2.0, 3.0, 5.0])
    options = {"cu_seqlens": torch.tensor(bounds), "weights": weights, "aggregation": "token-sum"}
    result = fr.policy_loss(lp, lp.detach(), torch.ones(len(bounds) - 1), **options)
    assert torch.autograd.grad(result.loss, lp)[0].tolist() == [-2.0, -3.0, -5.0]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [7, 7, 8, 8], [-1, -1, 0, 0], [3, 3, 90, 90]])
def test_groups_of_any_labels_stay_apart(labels: list[int]) -> None:
    lp, old = torch.tensor([[-0.5], [-0.3], [-0.9], [-0.2]]), torch.full((4, 1), -0.4)
    adv = torch.tensor([1.0, 0.0, 1.0, 0.0])
    found, wanted = (
        fr.policy_loss(lp, old, adv, loss=fr.losses.real(), group_ids=torch.tensor(ids)).loss
        for ids in (labels, [10, 10, 20, 20])
    )
    assert torch.equal(found, wanted)
    whole = fr.policy_loss(lp, old, adv, loss=fr.losses.real(), group_size=4).loss
    assert not torch.equal(found, whole)


def test_compiles_in_one_graph() -> None:
    data = batch()

    def step(lp: Tensor) -> Tensor:
        return fr.policy_loss(lp * 1.1, data["old_logprobs"], data["advantages"], data["mask"]).loss * 2

    lp = data["logprobs"].requires_grad_()
    (eager,) = torch.autograd.grad(step(lp), lp)
    (compiled,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(lp), lp)
    assert torch.allclose(eager, compiled, atol=1e-8)


def test_numpy_extras() -> None:
    np = pytest.importorskip("numpy")
    data = batch()
    teacher = torch.randn(6, 37)
    got = fr.policy_loss(**data, loss=fr.losses.sdpo(), extra={"teacher_logprob": teacher.numpy()})
    want = fr.policy_loss(**data, loss=fr.losses.sdpo(), extra={"teacher_logprob": teacher})
    assert isinstance(got.loss, torch.Tensor)  # beside tensors
    assert torch.equal(got.loss, want.loss)
    arrays = {k: v.numpy() for k, v in data.items()}
    loss = fr.policy_loss(**arrays, loss=fr.losses.sdpo(), extra={"teacher_logprob": teacher.numpy()}).loss
    assert isinstance(loss, np.ndarray)
    assert loss == want.loss.numpy()


def test_numpy_in_numpy_out() -> None:
    np = pytest.importorskip("numpy")
    data = batch()
    result = fr.policy_loss(**{k: v.numpy() for k, v in data.items()})
    assert isinstance(result.loss, np.ndarray)
    assert isinstance(result.metrics["ratio_mean"], (np.ndarray, np.floating))
    assert np.allclose(result.loss, fr.policy_loss(**data).loss.numpy())


def test_a_bonus_on_a_constant_entropy_is_refused() -> None:
    """It would change the loss and train nothing; where nothing is trained it is a number like any other."""
    logprobs, entropy = torch.randn(2, 3), torch.rand(2, 3)
    arguments = (logprobs.clone(), torch.ones(2))
    trained = logprobs.requires_grad_()
    with pytest.raises(ValueError, match="entropy: expected a tensor that requires grad where entropy_coef is not 0"):
        fr.policy_loss(trained, *arguments, entropy=entropy, entropy_coef=0.1)
    assert "entropy_mean" in fr.policy_loss(trained, *arguments, entropy=entropy).metrics.names
    fr.policy_loss(trained, *arguments, entropy=entropy.clone().requires_grad_(), entropy_coef=0.1)
    with torch.no_grad():
        fr.policy_loss(trained, *arguments, entropy=entropy, entropy_coef=0.1)


@pytest.mark.parametrize("shape", [(2, 3), (6,)])
@pytest.mark.parametrize("trained", ["logprobs", "values", "log_z"])
def test_a_graph_that_is_kept_gives_its_gradient_again(trained: str, shape: tuple[int, ...]) -> None:
    """What a backward hands out may become a leaf's .grad, which is added to and cleared in place."""
    leaf = torch.linspace(-1.0, 0.0, 6).reshape(shape).requires_grad_()
    x, old, advantages = leaf.view(2, 3), torch.full((2, 3), -0.5), torch.tensor([1.0, -1.0])
    if trained == "logprobs":
        loss = fr.policy_loss(x, old, advantages).loss
    elif trained == "values":
        loss = fr.value_loss(x, None, old, clip=None).loss
    else:
        extra = {"log_z": x.view(6)}
        tokens = (old.view(6, 1), old.view(6, 1), advantages.repeat(3))
        loss = fr.policy_loss(*tokens, loss=fr.losses.flowrl(), ref_logprobs=old.view(6, 1), extra=extra).loss
    (want,) = torch.autograd.grad(1.5 * loss, leaf, retain_graph=True)
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * want / 1.5)
    leaf.grad.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], want / 1.5)
