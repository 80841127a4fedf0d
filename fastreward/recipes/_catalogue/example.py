"""A program for each recipe that runs as it is: small tensors, the call, the gradient."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Final

#: name -> (how the example makes it, what it is), in the order of the program.
_MADE: Final = {
    "logprobs": ("(-1 - torch.rand(4, 6)).requires_grad_()", "of the policy being trained: [responses, tokens]"),
    "old_logprobs": ("logprobs.detach() + 0.1 * torch.randn(4, 6)", "of the policy that the ratio is against"),
    "rollout_logprobs": ("old_logprobs + 0.1 * torch.randn(4, 6)", "as the inference engine reported them"),
    "ref_logprobs": ("logprobs.detach() + 0.1 * torch.randn(4, 6)", "of the reference policy"),
    "teacher_logprobs": ("logprobs.detach() + 0.1 * torch.randn(4, 6)", "of the same tokens, by the teacher"),
    "mask": ("torch.arange(6) < torch.tensor([[6], [4], [5], [6]])", "tokens that count"),
    "importance": ("torch.rand(4, 6)", "losses.tw_grpo_importance makes it from whole distributions"),
    "answer": ("torch.arange(6) >= torch.tensor([[4], [2], [3], [4]])", "tokens of the reference answer"),
    "score_token": ("torch.arange(6) == torch.tensor([[5], [3], [4], [5]])", "the token behind the response"),
    "expert": ("torch.tensor([0, 1, 0, 1])", "rows with a given answer"),
    "rewards": ("torch.tensor([1.0, 0.0, 0.0, 1.0])", "one per response"),
    "group_ids": ('["a", "a", "b", "b"]', "which responses are to the same prompt"),
    "advantages": ("fr.group_advantages(rewards, group_ids{advantages})", ""),
    "tokens": (
        "torch.tensor([[5, 1, 2, 7, 8, 9], [5, 1, 3, 4, 0, 0], [6, 2, 2, 1, 3, 0], [6, 2, 4, 4, 1, 2]])",
        "of the responses",
    ),
    "tree": ("fr.PrefixTree(tokens, mask, group_ids)", ""),
    "node_entropy": ("torch.rand(tree.num_nodes)", "of the policy, mean over the node's tokens"),
    "node_visits": ("torch.arange(1, tree.num_nodes + 1)", "of the search"),
    "step_rewards": ("torch.rand(tree.num_nodes)", "a judge's, per node"),
    "entropy": ("torch.rand(4)", "after the tool's answer, one per response under way"),
    "initial_entropy": ("torch.rand(4)", "of the first tokens"),
    "predicted": ("torch.zeros(4, 6).requires_grad_()", "by the value head that is trained"),
    "chosen_logprobs": ("(-1 - torch.rand(4, 6)).requires_grad_()", "of the policy being trained: [pairs, tokens]"),
    "rejected_logprobs": ("(-1 - torch.rand(4, 8)).requires_grad_()", "its own length"),
    "ref_chosen_logprobs": ("chosen_logprobs.detach() + 0.1 * torch.randn(4, 6)", "of the reference policy"),
    "ref_rejected_logprobs": ("rejected_logprobs.detach() + 0.1 * torch.randn(4, 8)", ""),
    "chosen_mask": ("torch.arange(6) < torch.tensor([[6], [4], [5], [6]])", "tokens that count"),
    "rejected_mask": ("torch.arange(8) < torch.tensor([[3], [8], [7], [5]])", ""),
    "chosen_log_sum_sq_probs": ("-torch.rand(4, 6)", "an output of fr.token_logprobs"),
    "rejected_log_sum_sq_probs": ("-torch.rand(4, 8)", ""),
    "chosen_rm_logprobs": ("-1 - torch.rand(4, 6)", "of the model that guides the tokens"),
    "rejected_rm_logprobs": ("-1 - torch.rand(4, 8)", ""),
    "chosen_better_logprobs": ("-1 - torch.rand(4, 6)", "under the prompt that asks for a better response"),
    "chosen_worse_logprobs": ("-1 - torch.rand(4, 6)", "and for a worse one"),
    "rejected_better_logprobs": ("-1 - torch.rand(4, 8)", ""),
    "rejected_worse_logprobs": ("-1 - torch.rand(4, 8)", ""),
    "consistency": ("torch.rand(4)", "of two rankings, per pair"),
    "win_rate_chosen": ("torch.tensor([0.9, 0.6, 0.7, 0.8])", "per pair"),
    "win_rate_rejected": ("torch.tensor([0.2, 0.5, 0.4, 0.1])", ""),
    "score_chosen": ("torch.tensor([0.8, 0.1, 0.4, 0.6])", "of the preference model, per pair"),
    "score_rejected": ("torch.tensor([-0.5, 0.0, -0.2, -0.7])", ""),
    "dimensions": ('["helpful", "helpful", "harmless", "concise"]', "of the pairs"),
}
#: The same where a recipe's arguments are of another kind.
_MADE_FOR: Final = {
    "sdpo_topk": {
        "student": ("torch.randn(4, 6, 32).log_softmax(-1)", "log-probs of the whole vocabulary"),
        "ids": ("student.topk(5).indices", "[responses, tokens, k]"),
        "logprobs": ("student.gather(-1, ids).requires_grad_()", "fr.token_logprobs(..., token_ids=ids) gives them"),
        "teacher_logprobs": ("torch.randn(4, 6, 32).log_softmax(-1).gather(-1, ids)", "of the same ids"),
    },
    "verifree": {
        "rewards": ("(old_logprobs * (answer & mask)).sum(-1).exp()", "likelihood of the reference answer"),
    },
    "rose": {
        "parents": ("torch.tensor([-1, 0, -1, 2])", "the response that each has branched off, -1: none"),
        "positions": ("torch.tensor([0, 2, 0, 3])", "tokens that it shares with it"),
        "lengths": ("torch.tensor([6, 4, 5, 6])", ""),
        "tree": ("fr.PrefixTree.from_branches(parents, positions, lengths, group_ids, mask=mask)", ""),
    },
}
#: What a recipe returns -> (names for it, the lines that make a loss of it).
_LOSS: Final = "loss = fr.policy_loss(logprobs, old_logprobs, advantages, mask).loss"
_WITH: Final = "result = fr.policy_loss(logprobs, old_logprobs, advantages, mask, {})"
_RETURNED: Final = {
    "loss": ("result", ()),
    "weights": ("weights, keep, metrics", (_WITH.format("weights=weights, keep=keep"),)),
    "mask": ("keep", (_WITH.format("keep=keep"),)),
    "advantages": ("advantages", (_LOSS,)),
    "values": ("values", ("loss = (predicted - values).square()[mask].mean()",)),
    "node values": ("node_values", ("advantages = tree.to_tokens(tree.advantages(node_values))", _LOSS)),
    "decision": ("branch", ('print("branch:", branch.tolist())', _LOSS)),
}
_HEAD: Final = """import torch
import fastreward as fr
from fastreward import recipes

torch.manual_seed(0)"""


def example(
    function: Callable[..., Any], returns: str, advantages: str, passes: tuple[str, ...], settings: Mapping[str, Any]
) -> str:
    """The program for a recipe: its function, and the fields of its registration."""
    arguments, name = _arguments(function, passes, settings), function.__name__
    names, following = _RETURNED[returns]
    lines = [_wrapped(f"{names} = recipes.{name}(", arguments), *following]
    loss = "loss" if any(line.startswith("loss = ") for line in following) else "result.loss"
    trained = "predicted" if returns == "values" else arguments[0] if returns == "loss" else "logprobs"
    lines += [f"{loss}.backward()", f"print({loss}.item(), {trained}.grad.abs().sum().item())"]
    return "\n".join([_HEAD, *_set_up("\n".join(lines), name, advantages), "", *lines]) + "\n"


def _arguments(function: Callable[..., Any], passes: tuple[str, ...], settings: Mapping[str, Any]) -> list[str]:
    """Every required argument and the mask, then what the recipe's registration adds."""
    found = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.POSITIONAL_OR_KEYWORD and (p.default is p.empty or p.name == "mask"):
            found.append(p.name)
    found += [item if "=" in item else f"{item}={item}" for item in passes]
    return found + [f"{name}={value!r}" for name, value in settings.items()]


def _wrapped(start: str, arguments: list[str]) -> str:
    text = ", ".join(arguments)
    if len(start) + len(text) < 110:
        return f"{start}{text})"
    indent = "    "
    return f"{start}\n{textwrap.fill(text, 108, initial_indent=indent, subsequent_indent=indent)}\n)"


def _set_up(program: str, name: str, advantages: str) -> list[str]:
    """The lines that make what the program names, and what these name in turn."""
    other = _MADE_FOR.get(name, {})
    made = {**{used: line for used, line in other.items() if used not in _MADE}, **_MADE, **other}
    lines: list[str] = []
    for used, (code, comment) in reversed(made.items()):
        if re.search(rf"\b{used}\b", program) and not re.search(rf"^{used} = ", program, re.MULTILINE):
            code = code.replace("{advantages}", f", {advantages}" if advantages else "")
            program += "\n" + code
            lines.append(f"{used} = {code}" + (f"  # {comment}" if comment else ""))
    return lines[::-1]
