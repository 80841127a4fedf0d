"""What the programs of example.py are made of: for each name that a recipe's arguments have, the code that makes it."""

from __future__ import annotations

from typing import Final

Made = dict[str, tuple[str, str]]

#: name -> (how the example makes it, what it is), in the order of the program.
_COMMON: Final[Made] = {
    "logprobs": ("(-1 - torch.rand(4, 6)).requires_grad_()", "of the policy being trained: [responses, tokens]"),
    "old_logprobs": ("logprobs.detach() + 0.1 * torch.randn(4, 6)", "of the policy that the ratio is against"),
    "rollout_logprobs": ("old_logprobs + 0.1 * torch.randn(4, 6)", "as the inference engine reported them"),
    "ref_logprobs": ("logprobs.detach() + 0.1 * torch.randn(4, 6)", "of the reference policy"),
    "teacher_logprobs": ("logprobs.detach() + 0.1 * torch.randn(4, 6)", "of the same tokens, by the teacher"),
    "mask": ("torch.arange(6) < torch.tensor([[6], [4], [5], [6]])", "tokens that count"),
    "importance": ("torch.rand(4, 6)", "losses.tw_grpo_importance makes it from whole distributions"),
    "answer": ("torch.arange(6) >= torch.tensor([[4], [2], [3], [4]])", "tokens of the reference answer"),
    "score_token": ("torch.arange(6) == torch.tensor([[5], [3], [4], [5]])", "the token behind the response"),
    "observation": ("torch.tensor([[0, 0, 1, 1, 0, 0]] * 4)", "a tool's tokens"),
    "versions": ("torch.tensor([[4, 4, 5, 5, 6, 6]] * 4)", "of the policy that wrote the token"),
    "desirable": ("torch.tensor([1.0, 0.0, 1.0, 0.0])", "1: wanted"),
    "expert": ("torch.tensor([0, 1, 0, 1])", "rows with a given answer"),
    "log_z": ("torch.zeros(4).requires_grad_()", "of each response's prompt, by a head that is trained"),
    "rewards": ("torch.tensor([1.0, 0.0, 0.0, 1.0])", "one per response"),
    "group_ids": ('["a", "a", "b", "b"]', "which responses are to the same prompt"),
    "advantages": ("fr.group_advantages(rewards, group_ids{advantages})", ""),
    "tokens": (
        "torch.tensor([[5, 1, 2, 7, 8, 9], [5, 1, 3, 4, 0, 0], [6, 2, 2, 1, 3, 0], [6, 2, 4, 4, 1, 2]])",
        "of the responses",
    ),
    "segment_ids": ("torch.where(mask, torch.arange(6) // 3, -1)", "the turn, or step, of each token"),
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
    "gold_logprobs": ("(-1 - torch.rand(4, 5)).requires_grad_()", "of a third response, better than the chosen one"),
    "consistency": ("torch.rand(4)", "of two rankings, per pair"),
    "win_rate_chosen": ("torch.tensor([0.9, 0.6, 0.7, 0.8])", "per pair"),
    "win_rate_rejected": ("torch.tensor([0.2, 0.5, 0.4, 0.1])", ""),
    "score_chosen": ("torch.tensor([0.8, 0.1, 0.4, 0.6])", "of the preference model, per pair"),
    "score_rejected": ("torch.tensor([-0.5, 0.0, -0.2, -0.7])", ""),
    "dimensions": ('["helpful", "helpful", "harmless", "concise"]', "of the pairs"),
}
#: What only the recipes of one family take; a line may name what stands above it.
_TOKEN_CREDIT: Final[Made] = {
    "rm_logprobs": ("ref_logprobs + 0.1 * torch.randn(4, 6)", "by the reward model"),
    "step_scores": ("torch.rand(4, 2)", "a reward model's, per step"),
    "step_values": ("torch.rand(4, 2)", "what more rollouts get on average, per step"),
    "verdicts": ("torch.tensor([[1, 1], [1, 0], [0, 1], [1, 0]])", "a judge's, per step"),
    "accuracies": ("torch.rand(4, 2)", "of probes where each step ends"),
    "confidences": ("torch.rand(4, 2)", "of the same"),
    "completeness": ("torch.randn(4)", "of the whole responses, by a third reward model"),
    "errors": ("torch.rand(4, 6, 4) < 0.3", "tokens that each of four critiques calls wrong"),
    "deviations": ("torch.rand(4, 6)", "of the hidden states, from a flow model's"),
    "ranks": ("10 + torch.rand(4, 3)", "effective rank of the hidden states, velocity, acceleration"),
    "averages": ("torch.tensor([10.4, 10.5, 10.5])", "of the batches before"),
    "vocab_logprobs": ("torch.randn(4, 6, 32).log_softmax(-1)", "of the whole vocabulary"),
    "residuals": ("torch.eye(5)[tokens % 5] - 0.2", "one-hot less probabilities"),
    "hidden": ("torch.randn(4, 6, 3)", "last hidden states"),
}
_TURN_CREDIT: Final[Made] = {
    "turn_rewards": ("torch.tensor([[0.2, 1.0], [0.5, 0.0], [0.0, 0.3], [0.1, 1.0]])", "one per turn"),
    "turn_scores": ("torch.tensor([[0.9, 0.8], [0.9, 0.2], [0.3, 0.6], [0.7, 0.9]])", "a judge's, one per turn"),
    "states": (
        '[["start", "hall"], ["start", "attic"], ["start", "hall"], ["start", "hall"]]',
        "seen before each turn",
    ),
    "tags": ('[["plan", "explore"], ["plan", "explore"], ["plan", "reflect"], ["plan", "reflect"]]', "of each turn"),
    "prm_logprobs": ("-1 - torch.rand(4, 6)", "of the same tokens, by the implicit reward model"),
    "call_scores": ("torch.rand(4, 2, 2)", "of each call with each call of the reference"),
    "call_turns": ("torch.tensor([[0, 1], [0, 0], [0, 1], [0, -1]])", "the turn of each call, -1: there is none"),
    "criteria": ("torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])", "which each response meets"),
    "open_criteria": ("torch.eye(2).expand(4, 2, 2)", "the first at the first turn, the second at the second"),
    "evidence": ("torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])", "1: a chunk that is of use"),
    "answerability": ("torch.rand(4, 2)", "per step"),
    "decomposition": ("torch.rand(4, 2)", "per step"),
    "intents": ("torch.rand(4, 2)", "F1 of each query with the gold rewrite"),
    "rubrics": ("torch.tensor([0.8, 0.4, 0.5, 0.6])", "share of the rubrics that are met"),
}
_GROUP_ADVANTAGE: Final[Made] = {
    "token_rewards": ("fr.token_rewards(rewards, mask)", "each score on the last token of its response"),
    "greedy_rewards": ("torch.tensor([0.0, 0.0, 1.0, 1.0])", "of the greedy response to the same prompt"),
    "wins": ("torch.tensor([1.0, 0.0, 0.5, 0.5])", "points of each response in its group"),
    "comparisons": ("torch.tensor([[1.0, 0.5], [0.0, 0.5], [1.0, 1.0], [0.0, 0.0]])", "won, lost, tied"),
    "signals": ("torch.tensor([[1.0, 0.2], [1.0, 0.9], [0.0, 0.5], [1.0, 0.1]])", "the most important one first"),
    "differences": ("torch.tensor([[0.0, 2.0], [-2.0, 0.0], [0.0, -1.0], [1.0, 0.0]])", "how much i beats j"),
    "criteria": ("torch.tensor([[2.0, -1.0], [0.0, 0.0], [-3.0, 1.0], [1.0, 1.0]])", "of a rubric, against another"),
    "criterion_weights": ("torch.tensor([5.0, 1.0])", "core, highlight"),
    "critical": ("torch.tensor([False, False])", "fatal flaws"),
    "votes": ("torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])", "against the group's reference"),
    "reference": ("torch.tensor([False, True, False, True])", "of each group"),
    "log_sum_sq_probs": ("-0.5 - torch.rand(4, 6)", "an output of fr.token_logprobs"),
    "bundle_ids": ('["x", "y", "x", "y"]', "the first response to each prompt, the second, ..."),
    "roles": ("torch.tensor([0, 1, 0, 1])", "who played"),
    "problem_ids": ("torch.tensor([7, 7, 8, 8])", "which a solver was given; -1: a proposer"),
    "hardness": ("torch.tensor([0.4, 0.4, 0.7, 0.7])", "of the prompt"),
    "reward_gaps": ("torch.tensor([0.2, 0.9, 0.8, 0.1])", "to the demonstration"),
    "easy": ("torch.tensor([False, False, True, True])", "the easy prompt of its pair"),
    "passed": ("(torch.rand(4, 2, 3) < 0.5).float()", "tests of each turn's code"),
    "thinking_rewards": ("torch.tensor([0.6, 0.4, 0.1, 0.9])", "a judge's"),
    "flawed": ("torch.tensor([True, False, False, False])", "right, but by a mistake"),
    "partner_ids": ('["b", "b", "a", "a"]', "the other form of the question"),
    "semantic_rewards": ("torch.tensor([0.91, 0.87, 0.88, 0.9])", "of the meaning"),
    "image_scores": ("torch.rand(4, 3)", "of each sentence"),
    "text_scores": ("torch.rand(4, 3)", "its likelihood"),
    "process_rewards": ("torch.tensor([0.7, 0.2, 0.3, 0.8])", "mean over the steps"),
    "losses": ("torch.rand(2, 4)", "of two objectives, at the steps before"),
    "objectives": ("torch.tensor([0, 0, 1, 1])", "what a response is trained on"),
}
_REWARD_SHAPING: Final[Made] = {
    "components": (
        "torch.tensor([[1.0, 0.2], [0.0, 0.3], [0.6, 0.1], [1.0, 0.9]])",
        "several rewards of each response",
    ),
    "reference_rewards": ("torch.randn(4, 10)", "of ten responses of the reference model to the same prompt"),
    "mean": ("torch.tensor([0.4, 0.3])", "of the reference model's rewards"),
    "std": ("torch.tensor([0.5, 0.3])", ""),
    "constrained": ("torch.rand(4, 2)", "rewards that have to reach a threshold"),
    "bottom_line": ("torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.9], [0.8, 1.0]])", "what has to hold"),
    "utilities": ("torch.rand(4, 3)", "what is good to have"),
    "progress": ("torch.tensor([1.0, 0.4, 0.7, 0.9])", "what has been achieved"),
    "factors": ("torch.tensor([[1.0, 1.0], [0.5, 1.0], [1.0, 0.7], [1.0, 1.0]])", "below 1: a fault"),
    "conciseness": ("torch.tensor([0.9, 0.3, 0.5, 0.7])", "of the conciseness reward model"),
    "difficulty": ("torch.tensor([0.5, 0.5, 0.0, 0.0])", "of the prompt"),
    "veto": ("torch.tensor([True, False])", "items without which nothing counts"),
    "format_rewards": ("torch.tensor([0.0, -1.0, 0.0, 0.0])", "of the format"),
    "matches": ("torch.tensor([1.0, 0.2, 0.5, 0.8])", "the share of the calls that is right"),
    "costs": ("torch.tensor([0.3, 0.9, 0.5, 0.1])", "higher for cheaper models"),
    "relevance": ("torch.tensor([0.9, 0.4, 0.6, 0.8])", "of the response to the prompt"),
    "length_incentive": ("torch.tensor([1.0, 0.5, 0.8, 0.9])", "grows with the length"),
}
_LIKELIHOOD: Final[Made] = {
    "answer_logprobs": ("-torch.rand(4, 3)", "of the reference answer, spliced in behind each response"),
    "answer_mask": ("torch.arange(3) < torch.tensor([[3], [3], [2], [2]])", "its tokens"),
    "baseline": ("torch.tensor([0.4, 0.4, 0.5, 0.5])", "the same without the reasoning"),
    "own_logprobs": ("-torch.rand(4, 5)", "of the response's own answer"),
    "own_mask": ("torch.arange(5) < torch.tensor([[2], [5], [3], [1]])", ""),
    "alone_logprobs": ("-1.5 - torch.rand(4, 6)", "of the response without its question"),
    "strong_logprobs": ("-1 - torch.rand(4, 6)", "of the response, by an aligned model"),
    "weak_logprobs": ("-1.2 - torch.rand(4, 6)", "by one that was not"),
    "prompt_logprobs": ("-torch.rand(4, 3)", "of the prompt's tokens behind its picture"),
    "prompt_mask": ("torch.arange(3) < torch.tensor([[3], [3], [2], [2]])", ""),
    "positive": ("-3 - torch.rand(4, 10)", "of ten follow-ups that show content"),
    "negative": ("-3 - torch.rand(4, 10)", "of ten that show none"),
    "verdict_logprobs": ("torch.randn(4, 2).log_softmax(-1)", "of a judge's yes and no"),
    "logsumexp": ("10 + torch.rand(4, 6)", "an output of fr.token_logprobs"),
    "mean_logit": ("torch.rand(4, 6)", "another"),
    "label_logit": ("8 + torch.rand(4, 6)", "another"),
    "rating_logprobs": ("torch.randn(4, 9).log_softmax(-1)", "of the tokens 1 to 9 behind each response"),
    "other_logprobs": ("torch.randn(4, 9).log_softmax(-1)", "behind another response to each prompt"),
    "bin_logprobs": ("torch.randn(4, 2, 3)", "of reserved tokens: two values, three lengths"),
    "likelihoods": ("torch.rand(4, 3)", "of the reference answer, behind the prompt and behind each turn"),
    "gains": ("torch.rand(4, 2, 5)", "of each step, on each suffix of the best reasoning"),
    "answer_scores": ("-3 * torch.rand(4)", "log-probs of the reference answer behind each response"),
    "answers": ('["7", "7", "12", "4"]', "as they were read from the responses"),
    "scores": ("torch.tensor([0.9, 0.2, 0.1, 0.8])", "of recipes.laser_score"),
    "score_logprobs": ("-20 - 5 * torch.rand(4)", "of a fixed token behind each response"),
}
_DISTILLATION: Final[Made] = {}
_DIVERGENCE: Final[Made] = {
    "teacher_logits": ("logits.detach() + 0.5 * torch.randn(4, 6, 32)", "of the teacher, of the same vocabulary"),
}
#: Every name, in the order of the program.
MADE: Final[Made] = {
    **_COMMON,
    **_TOKEN_CREDIT,
    **_TURN_CREDIT,
    **_GROUP_ADVANTAGE,
    **_REWARD_SHAPING,
    **_LIKELIHOOD,
    **_DISTILLATION,
    **_DIVERGENCE,
}
#: The same where a recipe's arguments are of another kind.
MADE_FOR: Final[dict[str, Made]] = {
    "bnpo": {"rewards": ("torch.tensor([1.0, 0.0, 1.0, 1.0])", "prompts have to differ")},
    "opo": {"lengths": ("torch.tensor([6, 4, 5, 6])", "tokens of each response")},
    "gdpo": {"rewards": ("torch.tensor([[1.0, 0.2], [0.0, 0.3], [0.0, 0.1], [1.0, 0.4]])", "two components")},
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
    # ---------------------------------------------------------------------------------------------- token_credit
    "fine_grained_rlhf": {"values": ("torch.rand(4, 6)", "of a critic")},
    # ----------------------------------------------------------------------------------------------- turn_credit
    "multi_turn_ppo": {"values": ("torch.rand(4, 6)", "of the critic, per token")},
    # ------------------------------------------------------------------------------------------- group_advantage
    "riskpo": {"rewards": ("torch.tensor([1.0, 0.0, 1.0, 0.0])", "one per response")},
    "copo": {"rewards": ("torch.tensor([1.0, 0.0, 1.0, 1.0])", "one per response")},
    "hierarchical_grpo": {"roles": ("torch.tensor([0, 0, 1, 1])", "who did it")},
    "weighted_grpo": {"group_ids": ('["p", "p", "p", "p"]', "a hard prompt and an easy one")},
    "co_reward": {"answers": ('["7", "12", "7", "4"]', "as they were read from the responses")},
    "dars": {"rewards": ("torch.tensor([1.0, 0.0, 0.0, 0.0])", "one per response")},
    # -------------------------------------------------------------------------------------------- reward_shaping
    "dapo_overlong": {"lengths": ("torch.tensor([20_000, 900, 12_000, 17_500])", "tokens of each response")},
    # ------------------------------------------------------------------------------------------------ likelihood
    "shop_r1": {"entropy": ("torch.rand(4, 6)", "an output of fr.token_logprobs")},
    "negative_entropy": {"entropy": ("torch.rand(4, 6)", "an output of fr.token_logprobs")},
    "zip_rc": {
        "values": ("torch.tensor([0.0, 1.0])", "of the bins"),
        "lengths": ("torch.tensor([128.0, 512.0, 2048.0])", "of the bins"),
    },
    "value_augmented": {
        "logits": ("torch.randn(4, 32)", "of the base model at the next token"),
        "token_ids": ("logits.topk(20).indices", "the likeliest"),
        "values": ("torch.rand(4, 20)", "of the text with each of them behind it"),
    },
    # ------------------------------------------------------------------------------------------------ divergence
    **{
        name: {"logits": ("torch.randn(4, 6, 32).requires_grad_()", "of the student: [responses, tokens, V]")}
        for name in ("gkd", "on_policy_distillation", "sdpo_logits")
    },
    "roll_kd": {
        "logits": ("torch.randn(4, 6, 32).requires_grad_()", "of the student: [responses, tokens, V]"),
        "labels": ("torch.randint(0, 32, (4, 6))", "the tokens of the responses"),
    },
    "topk_distillation": {
        "logits": ("torch.randn(4, 6, 32).requires_grad_()", "of the student: [responses, tokens, V]"),
        "sent": ("torch.randn(4, 6, 32).log_softmax(-1).topk(5)", "by the teacher, its likeliest tokens"),
        "token_ids": ("sent.indices", "[responses, tokens, k]"),
        "teacher_logprobs": ("sent.values", ""),
    },
}
