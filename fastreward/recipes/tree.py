"""Credit from prefix trees of rollouts: what a token is worth, as the sequences that share its prefix tell.

V(n) = the value of a node of `fastreward.PrefixTree`, p its parent, R = rewards [B], one per sequence. Recipes take the
tree first (TEMPO also the tokens, and makes it), and return float32 advantages or values in the shape of its tokens, 0
where its mask gives no credit: constants, for `policy_loss(..., advantages)`. Rewards may be of any dtype; NaN: not
scored. Such a sequence is in no statistic, and all its tokens get 0, also where others give their prefix a value; the
nodes stay what they are. Where a 0 is no neutral target, leave its tokens out of the loss.

Where a method's nodes are steps or segments that the sampler knows, build its tree with `PrefixTree.from_paths` (an id
for each sampled step) or `from_branches`: in a tree of tokens, siblings that happen to begin alike share a node.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastreward._arguments import check
from fastreward._arguments.groups import GroupIds
from fastreward._arguments.options import Singleton
from fastreward.prefix_tree.tree import PrefixTree
from fastreward.recipes._catalogue.registry import recipe
from fastreward.recipes._shared.tree import (
    beside_tokens,
    credited,
    group_of,
    in_last_node,
    labelled,
    node_tokens,
    normalized,
    of_parent,
    per_node,
    rewards_of,
    row_tokens,
    scored,
    scored_count,
    step_rewards_of,
    whitened,
)

__all__ = [
    "arpo_branch", "at2po", "portool", "rose", "slate", "spo_tree", "tempo", "tree_grpo", "treepo", "treepo_segment",
    "treerpo", "tvm",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- trees of tokens
@recipe(
    "TEMPO (tree-estimated mean prefix value for policy optimization)",
    "arXiv 2509.18314",
    note="an overview and a review that quote the paper; ddof and eps of the std are our guess",
    passes=("group_ids",),
)
def tempo(
    tokens: Tensor | PrefixTree,
    mask: Tensor | None,
    rewards: Tensor,
    *,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """A = (R - mean R + V(n) - V(p)) / (std R + eps), V the mean of R below; V(n) - V(p) at a node's first token only.

    GRPO's advantage, plus what is gained or lost where sequences part or end. Its prefix-to-tree step (P2T) is the
    PrefixTree that is made here; the values V themselves, as targets, are `recipes.tvm`.

    Args:
        tokens: integers [B, T], or packed [N] with cu_seqlens, of the responses; or a PrefixTree that has been built of
            them, with mask None and no groups.
        mask: the shape of tokens; nonzero = a token that gets credit. Where a node's first token gets none (tool output
            that differs), its V(n) - V(p) is dropped.
        rewards: [B].
        group_ids, group_size: one of them, as in `fastreward.group_advantages`.
        ddof, eps: of the std; nothing that we could read states them.
    """
    tree = _tree_of(tokens, mask, group_ids, group_size, cu_seqlens)
    own = normalized(rewards_of(tree, rewards), group_of(tree), ddof=ddof, eps=eps)
    difference = tree.advantages(tree.aggregate(own), "td")  # that of R, divided by the same std
    return node_tokens(tree, difference, place="start", row_values=own)


def _tree_of(
    tokens: Tensor | PrefixTree,
    mask: Tensor | None,
    group_ids: GroupIds | None,
    group_size: int | None,
    cu_seqlens: Tensor | None,
) -> PrefixTree:
    if not isinstance(tokens, PrefixTree):
        if (group_ids is None) == (group_size is None):
            raise ValueError("group_ids, group_size: expected exactly one of them")
        return PrefixTree(tokens, mask, group_ids, group_size=group_size, cu_seqlens=cu_seqlens)
    given = {"mask": mask, "group_ids": group_ids, "group_size": group_size, "cu_seqlens": cu_seqlens}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected None beside a PrefixTree, which has its own")
    return tokens


@recipe(
    "TVM's targets (token-supervised value models)",
    "arXiv 2407.12863",
    reconstructed="the abstract; the definition is the common one",
    returns="values",
)
def tvm(tree: PrefixTree, rewards: Tensor) -> Tensor:
    """V(n) = mean of R below: the share of correct ones among the responses with this prefix, for R in {0, 1}.

    The target of a value head at each token, whose prefix ends with it; the loss there is a squared error.
    """
    outcomes = rewards_of(tree, rewards)
    return node_tokens(tree, tree.aggregate(outcomes), row_values=scored(outcomes))


# -------------------------------------------------------------------------------------------- trees of steps, segments
@recipe(
    "SPO-tree (segment policy optimization)",
    "arXiv 2505.23564",
    code="AIFrameResearch/SPO hybrid_inference_strategy.py, tree_episode_generator.py",
    passes=("old_logprobs",),
)
def spo_tree(
    tree: PrefixTree,
    rewards: Tensor,
    *,
    variant: Literal["rloo", "grpo"] = "rloo",
    old_logprobs: Tensor | None = None,
    prob_threshold: float = 0.9,
    whiten: bool = True,
) -> Tensor:
    """A = V(n) - V(p), V the mean of the children's; whitened, over tokens with exp(old_lp) < prob_threshold.

    Tokens that were likelier get 0; leave them out of the loss too, with keep=. Without old_logprobs every credited
    token counts. variant "grpo": (V(n) - mean) / (std + 1e-8) over the siblings (ddof 0). Segments had 100 tokens,
    nodes 6 children. Not here: the prover's advantage, and that edges of advantage 0 are no samples. whiten=False: to
    whiten over all ranks, by `fastreward.whiten`.
    """
    check.choice("variant", variant, ("rloo", "grpo"))
    outcomes = rewards_of(tree, rewards)
    values = tree.aggregate(outcomes, over="children")
    if variant == "rloo":
        differences = tree.advantages(values, "td")
    else:
        differences = tree.advantages(values, "sibling", ddof=0, eps=1e-8)
    advantages = node_tokens(tree, differences, row_values=scored(outcomes))
    counted = credited(tree, outcomes)
    if old_logprobs is not None:
        check.shape("old_logprobs", check.tensor("old_logprobs", old_logprobs), tree.shape, "as tokens")
        check.same_device("old_logprobs", old_logprobs, "the tree", tree.leaf)
        unsure = counted & (old_logprobs.detach().exp() < prob_threshold)
        advantages = torch.where(unsure, advantages, 0.0)
        counted = unsure | (counted & ~unsure.any())  # none: they are all 0, but whitening needs tokens
    return whitened(advantages, counted, outcomes) if whiten else advantages


@recipe(
    "TreeRPO (tree relative policy optimization)",
    "arXiv 2506.05183",
    note="notes on the paper; ddof and eps of the std are our guess",
)
def treerpo(
    tree: PrefixTree, rewards: Tensor, *, scale: Literal["std", "none"] = "std", ddof: int = 1, eps: float = 1e-6
) -> Tensor:
    """A = (V(n) - mean) / (std + eps) over the siblings, V the mean of the children's; an only child gets 0.

    scale "none": only centred. ddof, eps: of the std; nothing that we could read states them.
    """
    outcomes = rewards_of(tree, rewards)
    values = tree.aggregate(outcomes, over="children")
    advantages = tree.advantages(values, "sibling", scale=scale, ddof=ddof, eps=eps)
    return node_tokens(tree, advantages, row_values=scored(outcomes))


@recipe(
    "PORTool (tool-use training with a rewarded tree)",
    "arXiv 2510.26020",
    reconstructed="notes on the paper; what aggregates, the exponent of gamma, both weights and the std are our guess",
)
def portool(
    tree: PrefixTree,
    rewards: Tensor,
    *,
    step_rewards: Tensor | None = None,
    gamma: float = 0.95,
    op: Literal["mean", "max"] = "mean",
    trajectory_weight: float = 1.0,
    fork_weight: float = 1.0,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """A = w1 norm(R over the group) + w2 norm(V over the siblings), V(n) = mean of gamma^(steps to the end) R + step.

    norm(x) = (x - mean) / (std + eps); w1, w2: trajectory_weight, fork_weight; an only child has no fork. A step is a
    node.

    Args:
        tree: of steps (`PrefixTree.from_paths`).
        rewards: [B], of the outcomes.
        step_rewards: [nodes], what a step earns by its format, for instance; NaN: not scored, the step is no sibling.
            None: nothing.
        gamma: above 0; the decay per step (0.95 is the paper's).
        op: "mean" or "max" over the trajectories through a step; the paper's is not known to us.
        trajectory_weight, fork_weight, ddof, eps: not known to us either.
    """
    check.choice("op", op, ("mean", "max"))
    gamma = check.positive("gamma", gamma)
    outcomes = rewards_of(tree, rewards)
    # From the ends of all sequences to the root, then back to the node: one power per sequence, one per node.
    decay = gamma ** tree.depth.double()
    values = tree.aggregate(outcomes * decay[tree.leaf], op) / decay
    if step_rewards is not None:
        values = values + step_rewards_of(tree, step_rewards)
    trajectory = normalized(outcomes, group_of(tree), ddof=ddof, eps=eps)
    fork = tree.advantages(values, "sibling", ddof=ddof, eps=eps)
    return node_tokens(tree, fork_weight * fork, row_values=trajectory_weight * trajectory)


@recipe(
    "Tree-GRPO (tree-based group relative policy optimization)",
    "arXiv 2509.21240",
    code="AMAP-ML/Tree-GRPO core_algos.py, ray_trainer_ts.py",
    passes=("group_size=4",),
)
def tree_grpo(
    tree: PrefixTree,
    rewards: Tensor,
    *,
    group_ids: GroupIds | None = None,
    group_size: int | None = None,
    sequential: bool = False,
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: Singleton = "raw",
) -> Tensor:
    """A = norm(R over the prompt) + norm(R over the tree), norm(x) = (x - mean) / (std + eps).

    The tree's groups are the search trees, two or more for a prompt; group_ids or group_size say which sequences have
    the same prompt, as in `fastreward.group_advantages`. sequential: norm over the tree of norm over the prompt
    ("tree_2norm"). singleton: of a lone sequence; "raw" is verl's (to 1e-6).
    """
    values = rewards_of(tree, rewards)
    prompt = normalized(values, group_ids, group_size=group_size, ddof=ddof, eps=eps, singleton=singleton)
    inner = normalized(prompt if sequential else values, group_of(tree), ddof=ddof, eps=eps, singleton=singleton)
    return row_tokens(tree, inner if sequential else prompt + inner)


_AT2PO_MODES: dict[str, Literal["td", "root", "td+root"]] = {
    "diff_parent": "td",
    "diff_global": "root",
    "diff_localglobal": "td+root",
}


@recipe(
    "AT2PO (agentic turn-based policy optimization via tree search)",
    "arXiv 2601.04767",
    code="zzfoutofspace/ATPO vllm_rollout_with_tools_tree_offline.py",
    passes=("entropy=node_entropy",),
)
def at2po(
    tree: PrefixTree,
    rewards: Tensor,
    *,
    entropy: Tensor | None = None,
    node_value: Literal["child_softmax", "child_mean", "leaf_mean"] = "child_softmax",
    advantage: Literal["node_value", "diff_parent", "diff_global", "diff_localglobal"] = "node_value",
    normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """A = V(n) = sum of softmax(entropy of the children) V(child), of R that is normalised over its tree.

    Args:
        tree: of turns, a group for each search tree.
        rewards: [B]; (R - mean) / (std + eps) with ddof 0 over the group, unless normalize=False.
        entropy: [nodes], mean of -log p over the tokens that the turn's policy wrote; for "child_softmax". A sequence
            that ends at an inner node counts as a child with entropy 0.
        node_value: or the mean of the children's values, or of those of all sequences below.
        advantage: "node_value" V(n), "diff_parent" V(n) - V(p), "diff_global" V(n) - V(root), "diff_localglobal" both.
    """
    check.choice("node_value", node_value, ("child_softmax", "child_mean", "leaf_mean"))
    check.choice("advantage", advantage, ("node_value", *_AT2PO_MODES))
    leaves = rewards_of(tree, rewards)
    if normalize:
        leaves = normalized(leaves, group_of(tree), ddof=0, eps=eps)
    if node_value == "leaf_mean":
        values = tree.aggregate(leaves)
    elif node_value == "child_mean":
        values = tree.aggregate(leaves, over="children")
    elif entropy is None:
        raise ValueError("entropy: needed for node_value='child_softmax'")
    else:
        weights = per_node(tree, entropy, "entropy").exp()
        values = tree.aggregate(leaves, over="children", child_weights=weights)
    if advantage != "node_value":
        values = tree.advantages(values, _AT2PO_MODES[advantage])
    return node_tokens(tree, values, row_values=scored(leaves))


@recipe("SLATE (truncated step-level sampling)", "arXiv 2602.23440", code="algoprog/SLATE step_level_algos.py")
def slate(tree: PrefixTree, step_rewards: Tensor, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """A = (r - mean) / (std + eps) over the candidates that continue one prefix, r a step's own reward.

    step_rewards: [nodes], the judge's, one per candidate step; roots' are not read, and `tree.node_of_token` says where
    a token's lies. A candidate without siblings gets 0; one that is NaN (not scored) gets 0 and is no sibling.
    """
    values = step_rewards_of(tree, step_rewards)
    return node_tokens(tree, tree.advantages(values, "sibling", ddof=ddof, eps=eps))


@recipe(
    "ARPO's branch decision (agentic reinforced policy optimization)",
    "arXiv 2507.19849",
    code="dongguanting/ARPO vllm_rollout_with_tools.py",
    returns="decision",
)
def arpo_branch(
    entropy: Tensor,
    initial_entropy: Tensor,
    *,
    weight: float = 0.5,
    threshold: float = 0.5,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Branch where clip(u - weight (H - H_initial), 0, 1) <= threshold, u uniform in [0, 1).

    At a tool call, while rolling out; the advantages are GRPO's, over all samples, `group_advantages(rewards, ...)`.

    Args:
        entropy: any shape, of the first tokens after the tool's answer (scaled to [0, 1] there).
        initial_entropy: the same shape, of the first tokens of the response.
        uniform: the same shape, the random numbers; None: drawn, from generator.

    Returns:
        bool in the shape of entropy.
    """
    for name, x in (("entropy", entropy), ("initial_entropy", initial_entropy)):
        check.shape(name, check.tensor(name, x), entropy.shape, "as entropy")
    if uniform is None:
        uniform = torch.rand(entropy.shape, generator=generator, device=entropy.device)
    check.shape("uniform", uniform, entropy.shape, "as entropy")
    chance = (uniform - weight * (entropy.detach() - initial_entropy.detach())).clamp(0.0, 1.0)
    return chance <= threshold


# --------------------------------------------------------------------------------------------------------------- ROSE
@recipe(
    "ROSE (reinforced efficient reasoning via semantically diverse exploration)",
    "arXiv 2601.05053",
    code="ZiqiZhao1/ROSE-rl core_algos.py `compute_grpo_iterative_branching_outcome_advantage`",
)
def rose(tree: PrefixTree, rewards: Tensor, *, length_penalty: float = 0.0, position_keyed: bool = False) -> Tensor:
    """A = V(n) - V(p) on the segments between branch points, V the mean of R below; a response's last has R - V(p).

    length_penalty > 0: where R is not 0, A - |A| f behind the last point that the response shares with the shortest
    such one of its group, f = 1 - (tokens of that one from there / its own)^length_penalty.

    Args:
        tree: `PrefixTree.from_branches`, or one of tokens.
        rewards: [B].
        length_penalty: 0 (the code's default) is off.
        position_keyed: the released code's values: the mean over all responses of a group that have a branch point at
            this position, whether they share the prefix or not; shared points of the penalty are positions too. This
            is exact where every branch leaves its parent behind the parent's own branch point.
    """
    outcomes = rewards_of(tree, rewards)
    values = tree.aggregate(outcomes)
    count = scored_count(tree, outcomes)
    shared = count > 1  # nodes that end at a branch point: more than one sequence has come so far
    keys = _position_keys(tree) if position_keyed else None
    if keys is not None:
        sums = torch.where(shared, values * count, 0.0)
        keyed = keys.aggregate(sums, "sum") / keys.aggregate(torch.where(shared, count, 0.0), "sum")
        values = torch.where(shared, keyed[keys.leaf], values)
    advantages = node_tokens(tree, tree.advantages(values, "td"), row_values=scored(outcomes))
    # Only a response that ends where others go on, or that has a twin, differs from its last node.
    own = row_tokens(tree, outcomes - values[tree.leaf])
    advantages = advantages + torch.where(in_last_node(tree), own, 0.0)
    if length_penalty <= 0.0:
        return advantages
    return advantages - advantages.abs() * _length_factor(tree, outcomes, length_penalty, shared, keys)


def _position_keys(tree: PrefixTree) -> PrefixTree:
    """The nodes of one group that end at one position, under one label."""
    return labelled(tree.root, tree.edge_start + tree.edge_length)


def _length_factor(tree: PrefixTree, outcomes: Tensor, power: float, shared: Tensor, keys: PrefixTree | None) -> Tensor:
    """ROSE's f, in the shape of tokens."""
    correct, lengths, group = outcomes.abs() > 1e-6, tree.lengths.double(), group_of(tree)
    shortest = tree.aggregate(torch.where(correct, lengths, torch.inf), "min")[group]
    number = torch.arange(tree.num_rows, device=lengths.device).double()
    first = tree.aggregate(torch.where(correct & (lengths == shortest), number, torch.inf), "min")
    common = first.isfinite() & (first == first[tree.root])  # on the way of the shortest correct one
    if keys is not None:
        at_shared = (common & shared).double()
        common = shared & (keys.aggregate(at_shared, "max")[keys.leaf] != 0)
    end = (tree.edge_start + tree.edge_length).double()
    last_common = tree.propagate((~common).double(), torch.where(common, end, 0.0))[tree.leaf]
    rest = (lengths - last_common).clamp(min=1.0)
    factor = (1.0 - ((shortest - last_common) / rest) ** power).clamp(min=0.0)
    factor = torch.where(correct & (shortest > 0), factor, 0.0)
    behind = node_tokens(tree, tree.edge_start) >= beside_tokens(tree, last_common.float())
    return torch.where(behind, row_tokens(tree, factor), 0.0)


# ------------------------------------------------------------------------------------------------------------- TreePO
@recipe("TreePO, one advantage per response", "arXiv 2508.17445", code="multimodal-art-projection/TreePO core_algos.py")
def treepo(
    tree: PrefixTree,
    rewards: Tensor,
    *,
    weighting: Literal["group_size", "average"] = "group_size",
    skip_constant: bool = False,
    whiten: bool = True,
) -> Tensor:
    """A = mean of R - V(a) over the response's nodes a that others share, weighted by their sequences; whitened.

    The root counts always (a lone response has A = R there). weighting "average": all nodes alike. skip_constant:
    nodes below the root whose sequences all have the same reward do not count. whiten=False: to whiten over all ranks,
    by `fastreward.whiten`.
    """
    check.choice("weighting", weighting, ("group_size", "average"))
    outcomes = rewards_of(tree, rewards)
    count = scored_count(tree, outcomes)
    eligible = count > 1
    values = torch.where(eligible, tree.aggregate(outcomes), 0.0)
    if skip_constant:
        eligible = eligible & (tree.aggregate(outcomes, "max") != tree.aggregate(outcomes, "min"))
    eligible = eligible | (tree.depth == 0)
    weights = torch.where(eligible, count if weighting == "group_size" else 1.0, 0.0)
    baseline = _from_root(tree, weights * values) / _from_root(tree, weights)
    advantages = row_tokens(tree, outcomes - baseline[tree.leaf])
    return whitened(advantages, credited(tree, outcomes), outcomes) if whiten else advantages


def _from_root(tree: PrefixTree, node_values: Tensor) -> Tensor:
    """[nodes]: the sum from the root down to the node."""
    return tree.propagate(1.0, node_values) + node_values[tree.root]


@recipe(
    "TreePO, advantages of segments",
    "arXiv 2508.17445",
    code="multimodal-art-projection/TreePO core_algos.py `compute_tree_rfpp_progress_outcome_advantage`",
)
def treepo_segment(
    tree: PrefixTree, rewards: Tensor, *, eta: float | None = None, sibling_norm: bool = False, whiten: bool = True
) -> Tensor:
    """A = V(n) - V(p), V the mean of the children's, from R - mean V' over the response's nodes; V(root) = 0; whitened.

    V' is the mean of R below, its mean over the nodes weighted by their sequences (root and last node included). eta:
    V(p) is multiplied by eta^(segments from n to the response's end, n included). sibling_norm: V is first (V - mean) /
    std over siblings (ddof 0; 0 where std is; an only child keeps its own). whiten=False: to whiten over all ranks.
    """
    outcomes = rewards_of(tree, rewards)
    count = scored_count(tree, outcomes)
    sums = torch.where(count > 0, count * tree.aggregate(outcomes), 0.0)
    leaves = outcomes - (_from_root(tree, sums) / _from_root(tree, count))[tree.leaf]
    values = tree.aggregate(leaves, over="children")
    if sibling_norm:
        values = _sibling_norm(tree, values)
    values = torch.where(tree.depth == 0, 0.0, values)
    there = scored(outcomes)
    above = node_tokens(tree, of_parent(tree, values), row_values=there)
    advantages = node_tokens(tree, values, row_values=there) - _decay(tree, eta) * above
    return whitened(advantages, credited(tree, outcomes), outcomes) if whiten else advantages


def _decay(tree: PrefixTree, eta: float | None) -> Tensor | float:
    """Eta to the number of segments from a token's own to the end of its response; it differs by response."""
    if eta is None:
        return 1.0
    eta = check.positive("eta", eta)
    return eta ** (beside_tokens(tree, tree.depth[tree.leaf] + 1.0) - node_tokens(tree, tree.depth)).clamp(min=0.0)


def _sibling_norm(tree: PrefixTree, values: Tensor) -> Tensor:
    centred = tree.advantages(values, "sibling", scale="none", singleton="raw")
    normed = tree.advantages(values, "sibling", ddof=0, eps=0.0, singleton="raw")
    # Their quotient is the std. Siblings that are equal but for rounding have one near 0: what is left is no signal.
    return torch.where(centred.abs() > 1e-8 * normed.abs(), normed, 0.0)
