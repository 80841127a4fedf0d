"""Every public operation with its options, as calls of any size; what they give, and the gradients of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

import fastreward as fr
from fastreward import divergences, losses

#: (sequences, tokens of the longest) of the calls.
SIZES = ((4, 5), (6, 7), (10, 9))
VOCAB = 11
DIVERGENCE = divergences.jsd(0.3)  # made outside of what torch.compile traces


@dataclass(frozen=True)
class Row:
    """An operation with some of its options: `make` gives the arguments of a call of B sequences of T tokens."""

    operation: str
    options: str
    make: Callable[[int, int], dict[str, Any]]
    call: Callable[..., Any] | None = None

    def __call__(self, **arguments: Any) -> Any:
        return (self.call or getattr(fr, self.operation))(**arguments)

    @property
    def numbers(self) -> bool:
        """Whether one of its arguments is a number."""
        return any(map(is_number, self.make(4, 5).values()))

    @property
    def id(self) -> str:
        return f"{self.operation}-{self.options}"


# ---------------------------------------------------------------------------------------------------- arguments
def per_token(B: int, T: int, *names: str, grad: Sequence[str] = ()) -> dict[str, Any]:
    return {name: (-torch.rand(B, T)).requires_grad_(name in grad) for name in names}


def mask(B: int, T: int) -> Tensor:
    return (torch.arange(T) < torch.arange(1, B + 1).clamp(max=T).unsqueeze(1)).float()


def lengths(B: int, T: int) -> Tensor:
    return torch.nn.functional.pad((torch.arange(B) % T).cumsum(0), (1, 0))


def packed(B: int, T: int, *names: str, grad: Sequence[str] = ()) -> dict[str, Any]:
    bounds = lengths(B, T)
    tokens = per_token(1, int(bounds[-1]), *names)
    return {k: x.detach().squeeze(0).requires_grad_(k in grad) for k, x in tokens.items()} | {"cu_seqlens": bounds}


def policy(B: int, T: int, *more: str, entropy: bool = False) -> dict[str, Any]:
    grad = ("logprobs", *(["entropy"] if entropy else []))
    return per_token(B, T, "old_logprobs", *grad, *more, grad=grad) | {"advantages": torch.randn(B), "mask": mask(B, T)}


def labelled(B: int, T: int, *, hidden: bool = False) -> dict[str, Any]:
    """Labels with what log-probs are made of."""
    labels = torch.randint(0, VOCAB, (B, T))
    if not hidden:
        return {"logits": torch.randn(B, T, VOCAB, requires_grad=True), "labels": labels}
    weight = torch.randn(VOCAB, 6, requires_grad=True)
    return {"hidden": torch.randn(B, T, 6, requires_grad=True), "weight": weight, "labels": labels}


def teacher(B: int, T: int) -> dict[str, Any]:
    """Logits of both sides."""
    return {name: torch.randn(B, T, VOCAB, requires_grad=True) for name in ("logits", "teacher_logits")}


def two_heads(B: int, T: int) -> dict[str, Any]:
    """Hidden states and LM heads of both sides."""
    return {
        "hidden": torch.randn(B, T, 6, requires_grad=True), "weight": torch.randn(VOCAB, 6, requires_grad=True),
        "teacher_hidden": torch.randn(B, T, 8), "teacher_weight": torch.randn(VOCAB, 8), "divergence": DIVERGENCE,
    }  # fmt: skip


def from_logits(B: int, T: int, *, hidden: bool = False) -> dict[str, Any]:
    return labelled(B, T, hidden=hidden) | {
        **per_token(B, T, "old_logprobs", "ref_logprobs"), "advantages": torch.randn(B), "mask": mask(B, T),
        "temperature": 1.0 / B, "kl": "k3", "kl_coef": 0.1 * B, "entropy_coef": 0.01 * T, "scale": 1.0 * B,
    }  # fmt: skip


def from_packed_logits(B: int, T: int, *, hidden: bool = False) -> dict[str, Any]:
    rest = packed(B, T, "old_logprobs", "weights")
    count = rest["weights"].shape[0]
    given = {k: v.squeeze(0).detach() for k, v in labelled(1, count).items()}
    given["logits"].requires_grad_()
    return given | rest | {"advantages": torch.randn(count), "keep": torch.arange(B) % 3 > 0, "loss": LOSSES["ppo"](B)}


def linear_scaled(B: int, T: int) -> dict[str, Any]:
    return labelled(B, T, hidden=True) | {
        "temperature": 0.3 * B, "logit_scale": 1.0 / T, "softcap": 2.0 * B, "outputs": ("logprobs", "entropy"),
    }  # fmt: skip


def pairs(B: int, T: int) -> dict[str, Any]:
    grad = ("chosen_logprobs", "rejected_logprobs")
    sides = per_token(B, T, grad[0], "ref_chosen_logprobs", grad=grad)
    sides |= per_token(B, T + 3, grad[1], "ref_rejected_logprobs", grad=grad)
    return sides | {
        "chosen_mask": mask(B, T), "rejected_mask": mask(B, T + 3) > 0, "weights": torch.rand(B), "normalizer": 1.0 * B,
        "loss": losses.dpo(beta=0.1 * B, label_smoothing=0.01 * T),
    }  # fmt: skip


def packed_pairs(B: int, T: int) -> dict[str, Any]:
    grad = ("chosen_logprobs", "rejected_logprobs")
    chosen, rejected = (packed(B, T - 2 * k, name, grad=grad) for k, name in enumerate(grad))
    return {
        grad[0]: chosen[grad[0]], "chosen_cu_seqlens": chosen["cu_seqlens"],
        grad[1]: rejected[grad[1]], "rejected_cu_seqlens": rejected["cu_seqlens"],
        "loss": losses.simpo(beta=0.5 * B), "group_ids": torch.arange(B) // 2, "aggregation": "group-mean",
    }  # fmt: skip


def turns(B: int, T: int) -> Tensor:
    return torch.where(torch.arange(T) % 3 == 2, -1, torch.arange(T) // 3).expand(B, T)


def rollouts(B: int, T: int) -> dict[str, Any]:
    return per_token(B, T, "old_logprobs", "rollout_logprobs") | {"mask": mask(B, T)}


def credit(tokens: Tensor, rewards: Tensor) -> Tensor:
    tree = fr.PrefixTree(tokens, group_size=2)
    return tree.to_tokens(tree.advantages(tree.aggregate(rewards)))


LOSSES = {
    "ppo": lambda B: losses.ppo(0.05 * B, 0.06 * B, dual_clip=1.0 + B),
    "gspo": lambda B: losses.gspo(0.01 * B),
}

ROWS = [
    Row(
        "token_logprobs", "shifted",
        lambda B, T: labelled(B, T + 1) | {"labels": torch.zeros(B, T, dtype=torch.int64)},
        lambda logits, labels: fr.token_logprobs(logits[:, :-1], labels),
    ),
    Row("token_logprobs", "masked", lambda B, T: labelled(B, T) | {"mask": mask(B, T), "temperature": 0.1 * B}),
    Row(
        "token_logprobs", "kept",
        lambda B, T: labelled(B, T) | {
            "temperature": torch.rand(B, T) + 0.1, "outputs": ("logprobs", "entropy", "id_logprobs", "rank"),
            "token_ids": torch.arange(3), "kept_tokens": torch.rand(B, T, VOCAB) > 0.2, "inplace_backward": True,
        },
    ),
    Row("linear_token_logprobs", "scaled", linear_scaled),
    Row("linear_token_logprobs", "masked", lambda B, T: labelled(B, T, hidden=True) | {"mask": mask(B, T)}),
    Row(
        "policy_loss", "kl-entropy",
        lambda B, T: policy(B, T, "ref_logprobs", "weights", entropy=True)
        | {"kl": "k3", "kl_coef": 0.1 * B, "entropy_coef": 0.01 * T, "normalizer": 1.0 * T, "loss": LOSSES["ppo"](B)},
    ),
    Row(
        "policy_loss", "grouped",
        lambda B, T: policy(B, T) | {"group_ids": torch.arange(B) // 2, "aggregation": "group-mean",
                                     "loss": LOSSES["gspo"](B), "return_token_loss": True,
                                     "return_tokens": ("clip", "ratio", "loss")},
    ),
    Row(
        "policy_loss", "group-size",
        lambda B, T: policy(B, T) | {"group_size": B // 2, "aggregation": "seq-mean-token-sum-norm",
                                     "loss": losses.real(tau=0.1 * B)},
    ),
    Row(
        "policy_loss", "packed",
        lambda B, T: packed(B, T, "logprobs", "old_logprobs", grad=("logprobs",)) | {
            "advantages": torch.randn(B), "keep": torch.arange(B) % 2 > 0, "aggregation": "seq-mean-token-sum-norm",
            "weights": torch.rand(B),
        },
    ),
    Row("logits_policy_loss", "masked",
        lambda B, T: from_logits(B, T) | {"return_tokens": ("entropy", "kl", "clip")}),
    Row("logits_policy_loss", "packed", from_packed_logits),
    Row("logits_policy_loss", "sequences", lambda B, T: from_logits(B, T) | {"loss": LOSSES["gspo"](B)}),
    Row("linear_policy_loss", "masked",
        lambda B, T: from_logits(B, T, hidden=True)
        | {"logit_scale": 1.0 / B, "softcap": 2.0 * T, "return_tokens": ("logprob",)}),
    Row("preference_loss", "masked", pairs),
    Row("preference_loss", "packed", packed_pairs),
    Row(
        "correction_weights", "masked",
        lambda B, T: rollouts(B, T) | {
            "mode": "mask", "level": "sequence", "low": 0.01 * B, "high": 1.0 * T, "log_ratio_clamp": 1.0 * T,
            "reject": {"token_k1": 1.0 + B, "seq_mean_k3": 0.1 * T}, "batch_normalize": True,
        },
    ),
    Row("correction_weights", "packed",
        lambda B, T: packed(B, T, "old_logprobs", "rollout_logprobs") | {"level": "geometric", "high": 1.0 * B}),
    Row("off_policy_sequence_mask", "masked",
        lambda B, T: per_token(B, T, "logprobs", "rollout_logprobs")
        | {"mask": mask(B, T), "advantages": -torch.rand(B), "threshold": 0.01 * B}),
    Row("group_advantages", "ids",
        lambda B, T: {"rewards": torch.randn(B), "group_ids": torch.arange(B) % (B // 2), "eps": 0.1 * B}),
    Row(
        "group_advantages", "size",
        lambda B, T: {"rewards": torch.randn(B, 3), "group_size": 2, "eps": 0.1 * B, "center": "length-weighted",
                      "lengths": torch.rand(B), "component_weights": torch.rand(3)},
    ),
    Row(
        "group_statistics", "ids",
        lambda B, T: {"x": torch.randn(B), "group_ids": torch.arange(B) % (B // 2), "weights": torch.rand(B),
                      "statistics": ("weighted-mean", "logsumexp", "rank")},
    ),
    Row(
        "PrefixTree", "credit",
        lambda B, T: {"tokens": torch.randint(0, 3, (B, T)), "rewards": torch.randn(B)}, credit,
    ),
    Row("segment_ids", "runs", lambda B, T: {"x": mask(B, T)}),
    Row("segment_ids", "separators",
        lambda B, T: {"x": torch.randint(0, 9, (B, T)), "separators": [3, 5], "mask": mask(B, T)}),
    Row("segment_ids", "ends", lambda B, T: {"x": mask(B, T), "ends": torch.arange(0, T, 2).expand(B, -1)}),
    Row("segment_reduce", "softmin",
        lambda B, T: per_token(B, T, "x", grad=("x",)) | {
            "segment_ids": turns(B, T), "op": "softmin", "temperature": 0.1 * B, "empty": 1.0 * T,
            "num_segments": T // 2, "weights": mask(B, T),
        }),
    Row("segment_reduce", "packed",
        lambda B, T: packed(B, T, "x", grad=("x",)) | {
            "segment_ids": turns(1, int(lengths(B, T)[-1])).squeeze(0), "op": "mean", "num_segments": B * T,
        }),
    Row("segment_diff", "lookahead",
        lambda B, T: per_token(B, T, "values", grad=("values",)) | {
            "mode": "lookahead", "mask": mask(B, T), "decay": 0.1 * B, "threshold": 0.01 * T,
        }),
    Row("segment_diff", "backward",
        lambda B, T: per_token(B, T, "values", "rewards", grad=("values",)) | {"first": 1.0 * B, "drop_last": True}),
    Row("scatter_rewards", "responses",
        lambda B, T: {"values": torch.randn(B, requires_grad=True), "mask": mask(B, T)}),
    Row("scatter_rewards", "segments",
        lambda B, T: {"values": torch.randn(B, T, requires_grad=True), "segment_ids": turns(B, T), "place": "spread"}),
    Row(
        "token_rewards", "kl",
        lambda B, T: per_token(B, T, "logprobs", "ref_logprobs")
        | {"scores": torch.randn(B), "mask": mask(B, T), "kl_coef": 0.1 * B, "kl": "k3", "kl_value_clamp": 1.0 * T},
    ),
    Row("token_rewards", "packed",
        lambda B, T: {"scores": torch.randn(B), "mask": torch.ones(int(lengths(B, T)[-1])), "place": "broadcast",
                      "cu_seqlens": lengths(B, T), "clip": (-0.5, 0.5)}),
    Row(
        "discounted_returns", "min",
        lambda B, T: per_token(B, T, "rewards") | {
            "mask": mask(B, T), "gamma": 0.1 * B, "temperature": 1.0 * T, "op": "min", "initial": torch.rand(B),
        },
    ),
    Row("discounted_returns", "left",
        lambda B, T: packed(B, T, "rewards") | {"gamma": torch.rand(B), "reverse": False}),
    Row(
        "gae", "whitened",
        lambda B, T: per_token(B, T, "rewards", "values", "lam") | {
            "mask": mask(B, T), "gamma": 0.1 * B, "next_values": torch.rand(B), "whiten": True, "at_masked": "zero",
        },
    ),
    Row("lambda_returns", "packed",
        lambda B, T: packed(B, T, "rewards", "next_values") | {"gamma": 0.1 * B, "lam": 1.0 / T}),
    Row(
        "vtrace", "masked",
        lambda B, T: per_token(B, T, "log_ratios", "rewards", "values", "next_values") | {
            "mask": mask(B, T), "rho_bar": 0.2 * B, "c_bar": 0.1 * T, "done": mask(B, T),
        },
    ),
    Row("token_divergence", "jsd",
        lambda B, T: teacher(B, T) | {"temperature": 0.3 * B, "teacher_temperature": 1.0 / T, "mask": mask(B, T),
                                      "divergence": DIVERGENCE}),
    Row("token_divergence", "statistics",
        lambda B, T: teacher(B, T) | {"labels": torch.randint(0, VOCAB, (B, T)), "temperature": torch.rand(B, T) + 0.5,
                                      "outputs": ("entropy", "teacher_entropy", "logprobs", "top1_agreement")}),
    Row("token_divergence", "ids",
        lambda B, T: {"logits": teacher(B, T)["logits"], "token_ids": torch.rand(B, T, VOCAB).topk(B - 1).indices,
                      "teacher_logprobs": -torch.rand(B, T, B - 1) - 3.0, "temperature": 0.3 * B, "mask": mask(B, T),
                      "divergence": DIVERGENCE, "outputs": ("entropy",)}),
    Row("linear_divergence", "scaled",
        lambda B, T: two_heads(B, T) | {"temperature": 0.3 * B, "logit_scale": 1.0 / T, "teacher_softcap": 2.0 * B,
                                        "softcap": 1.5 * B, "outputs": ("entropy", "teacher_entropy")}),
    Row("linear_divergence", "masked", lambda B, T: two_heads(B, T) | {"mask": mask(B, T)}),
    Row("linear_divergence", "ids",
        lambda B, T: two_heads(B, T) | {"token_ids": torch.rand(B, T, VOCAB).topk(B - 1).indices, "mask": mask(B, T)}),
    Row("value_loss", "masked",
        lambda B, T: per_token(B, T, "values", "old_values", "returns", grad=("values",))
        | {"mask": mask(B, T), "clip": 0.1 * B, "normalizer": 1.0 * T}),
    Row("value_loss", "packed",
        lambda B, T: packed(B, T, "values", "old_values", "returns", grad=("values",))
        | {"loss": "huber", "delta": 0.1 * T, "clip": None, "aggregation": "seq-mean-token-mean"}),
    Row("loss_normalizer", "sequences", lambda B, T: {"mask": mask(B, T), "aggregation": "seq-mean-token-sum-norm"}),
    Row("whiten", "masked", lambda B, T: {"x": torch.randn(B, T), "mask": mask(B, T), "eps": 0.1 * B}),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- results and gradients
def tensors_of(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if is_dataclass(result):
        return [x for f in fields(result) for x in tensors_of(getattr(result, f.name))]
    values = [result.values_tensor] if hasattr(result, "values_tensor") else result or ()
    values = values.values() if isinstance(values, dict) else values
    return [x for value in values for x in tensors_of(value)]


def evaluated(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    """Results, and the gradients of the differentiable ones for what wants one."""
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    results = tensors_of(function(**arguments))
    if not leaves:
        return results
    total = sum((x * (1.0 + k)).sum() for k, x in enumerate(x for x in results if x.requires_grad))
    return [*(x.detach().clone() for x in results), *torch.autograd.grad(total, leaves)]


def as_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with 0-d tensors for its numbers."""
    return {
        k: torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else as_tensors(x) if isinstance(x, dict) else x
        for k, x in arguments.items()
    }


def is_number(x: Any) -> bool:
    return isinstance(x, float) or (isinstance(x, dict) and any(map(is_number, x.values())))


def name_of(row: Row) -> str:
    return row.id


def copies(arguments: dict[str, Any]) -> dict[str, Any]:
    """With leaves of their own: a backward may write over its input."""
    return {
        k: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for k, x in arguments.items()
    }
