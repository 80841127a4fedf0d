"""Recipes over prefix trees: against plain recursion on random forests, and on trees whose answers are written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference_losses import tree as reference
from reference_losses.tree import Forest
from torch import Tensor
from tree_recipes import CASES, EVERY, SEEDS, Rows, branches_forest, steps_forest, tokens_forest

import fastreward as fr
from fastreward import PrefixTree, recipes


# --------------------------------------------------------------------------------------------------------------- data
def near(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    assert got.dtype == torch.float32
    assert not got.requires_grad
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


FORESTS = [pytest.param(make, id=make.__name__) for make in (tokens_forest, steps_forest)]
forests = pytest.mark.parametrize("make", FORESTS)
seeds = pytest.mark.parametrize("seed", SEEDS)
Make = Callable[[int], tuple[PrefixTree, Forest, list[float]]]


# ------------------------------------------------------------------------------------------------------ random forests
@seeds
@forests
@pytest.mark.parametrize("name", CASES)
def test_is_the_recursion_s(name: str, make: Make, seed: int) -> None:
    recipe, reference, options = CASES[name]
    tree, f, r = make(seed)
    near(recipe(tree, torch.tensor(r), **options), reference(f, r, **options))


@seeds
@forests
def test_tempo(make: Make, seed: int) -> None:
    """Steps of several tokens have their difference on all of these: there only trees of tokens."""
    tree, f, r = make(seed)
    if make is tokens_forest:
        near(recipes.tempo(tree, None, torch.tensor(r)), reference.tempo(f, r), 1e-5)
        near(recipes.tempo(tree, None, torch.tensor(r), ddof=0, eps=0.1), reference.tempo(f, r, 0, 0.1), 1e-5)


@seeds
def test_tempo_makes_the_tree(seed: int) -> None:
    tree, f, r = tokens_forest(seed)
    columns = tree.shape[1]
    tokens = torch.tensor([[*s, *[7] * (columns - len(s))] for s in f.sequences])
    mask, groups, values = torch.tensor(f.credit), f.groups, torch.tensor(r)
    want = recipes.tempo(tree, None, values)
    assert torch.equal(recipes.tempo(tokens, mask, values, group_ids=groups), want)
    keep = torch.arange(columns) < tree.lengths.unsqueeze(1)
    packed = recipes.tempo(
        tokens[keep],
        mask[keep],
        values,
        group_ids=groups,
        cu_seqlens=torch.nn.functional.pad(tree.lengths.cumsum(0), (1, 0)),
    )
    assert torch.equal(packed, want[keep])


@seeds
def test_packed_is_padded(seed: int) -> None:
    """Values of sequences find their tokens in packed trees too."""
    tree, f, r = tokens_forest(seed)
    keep = torch.arange(tree.shape[1]) < tree.lengths.unsqueeze(1)
    packed = PrefixTree(
        torch.tensor([t for s in f.sequences for t in s], dtype=torch.int64),
        torch.tensor(f.credit)[keep],
        f.groups,
        cu_seqlens=torch.nn.functional.pad(tree.lengths.cumsum(0), (1, 0)),
    )
    values = torch.tensor(r)
    for recipe, options in (
        (recipes.treepo, {"whiten": False}),
        (recipes.treepo_segment, {"eta": 0.5, "whiten": False}),
        (recipes.rose, {"length_penalty": 0.5}),
        (recipes.rose, {"length_penalty": 0.5, "position_keyed": True}),
        (recipes.portool, {}),
    ):
        assert torch.equal(recipe(packed, values, **options), recipe(tree, values, **options)[keep])


@seeds
@forests
def test_what_nodes_have(make: Make, seed: int) -> None:
    """Options with a number per node, or per sequence, besides the rewards."""
    tree, f, r = make(seed)
    values, torch_rng = torch.tensor(r), torch.Generator().manual_seed(seed)
    of_nodes = 0.1 + torch.rand(tree.num_nodes, generator=torch_rng, dtype=torch.float64)
    of_rows = torch.randint(0, 3, (tree.num_rows,), generator=torch_rng)
    nodes, rows = of_nodes.tolist(), of_rows.tolist()
    near(recipes.slate(tree, of_nodes), reference.slate(f, nodes), 1e-5)
    near(
        recipes.portool(tree, values, step_rewards=of_nodes, trajectory_weight=0.3, fork_weight=0.7),
        reference.portool(f, r, nodes, weights=(0.3, 0.7)),
    )
    near(recipes.mcts_step_values(tree, values, of_nodes), reference.mcts_step_values(f, r, nodes))
    near(recipes.propa(tree, values, visits=of_rows), reference.propa(f, r, rows))
    for reweight in ("sqrt", "uniform"):
        near(
            recipes.treerl(tree, values, reweight=reweight, selected=of_rows),
            reference.treerl(f, r, reweight=reweight, selected=[x > 0 for x in rows]),
        )
    for node_value in ("child_softmax", "child_mean", "leaf_mean"):
        for advantage in ("node_value", "diff_parent", "diff_global", "diff_localglobal"):
            options: dict[str, Any] = {"node_value": node_value, "advantage": advantage, "normalize": seed % 2 == 0}
            near(
                recipes.at2po(tree, values, entropy=of_nodes, **options), reference.at2po(f, r, nodes, **options), 1e-5
            )


@seeds
@forests
@pytest.mark.parametrize("form", ["mean", "sum"])
def test_diffusion_tree(make: Make, seed: int, form: Any) -> None:
    tree, f, r = make(seed)
    near(recipes.diffusion_tree(tree, torch.tensor(r), scale=3.0, form=form), reference.diffusion_tree(f, r, 3.0, form))


@seeds
@forests
@pytest.mark.parametrize("sequential", [False, True])
def test_tree_grpo(make: Make, seed: int, sequential: bool) -> None:
    tree, f, r = make(seed)
    prompts = [g % 2 for g in f.groups]  # type: ignore[operator]
    got = recipes.tree_grpo(tree, torch.tensor(r), group_ids=prompts, sequential=sequential)
    near(got, reference.tree_grpo(f, r, prompts, sequential), 1e-5)


@seeds
def test_spo_tree_looks_at_unlikely_tokens(seed: int) -> None:
    tree, f, r = tokens_forest(seed)
    if sum(map(sum, f.credit)) < 2:
        return
    old = -torch.rand(tree.shape, generator=torch.Generator().manual_seed(seed))
    for threshold in (0.6, 0.0):  # nothing is below 0: then all tokens count, and all advantages are 0
        counted = reference.credited(f) & (old.exp() < threshold)
        if int(counted.sum()) == 1:
            with pytest.raises(ValueError, match="counted positions"):
                recipes.spo_tree(tree, torch.tensor(r), old_logprobs=old, prob_threshold=threshold)
            continue
        want = reference.spo_tree(f, r, "rloo", old.double(), threshold)
        near(recipes.spo_tree(tree, torch.tensor(r), old_logprobs=old, prob_threshold=threshold), want, 1e-4)


@seeds
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 0.3])
def test_rose(seed: int, length_penalty: float) -> None:
    tree, f, r, parent, position = branches_forest(seed)
    values = torch.tensor(r)
    near(recipes.rose(tree, values, length_penalty=length_penalty), reference.rose(f, r, length_penalty))
    keyed = recipes.rose(tree, values, length_penalty=length_penalty, position_keyed=True)
    near(keyed, reference.rose_published(f, r, parent, position, length_penalty))


@seeds
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 0.3])
def test_rose_on_tokens(seed: int, length_penalty: float) -> None:
    tree, f, r = tokens_forest(seed)
    near(recipes.rose(tree, torch.tensor(r), length_penalty=length_penalty), reference.rose(f, r, length_penalty))


# ---------------------------------------------------------------------------------------------------- hand-drawn trees
# root - A [1] - B [2] - C [3]    row 0, R = 1
#      |       |       ` D [4 5]  row 1, R = 0
#      |       ` E [6]            row 2, R = 1
#      ` F [7]                    row 3, R = 0
# Nodes are numbered root, A .. F. Means of R below: root 1/2, A 2/3, B 1/2, C 1, D 0, E 1, F 0.
# Means of the children's: B 1/2, A (1/2 + 1) / 2 = 3/4, root (3/4 + 0) / 2 = 3/8.
DRAWN = [[1, 2, 3, 0], [1, 2, 4, 5], [1, 6, 0, 0], [7, 0, 0, 0]]
LENGTHS = [3, 4, 2, 1]
R = [1.0, 0.0, 1.0, 0.0]
S = 2**-0.5  # (x - mean) / std with ddof 1 of the greater of two


def drawn() -> PrefixTree:
    return PrefixTree(torch.tensor(DRAWN), torch.arange(4) < torch.tensor(LENGTHS).unsqueeze(1))


def by_node(a: float, b: float, c: float, d: float, e: float, f: float) -> Rows:
    return [[a, b, c], [a, b, d, d], [a, e], [f]]


ROOT3 = 3**0.5  # 1 / std of R with ddof 1: deviations of 1/2, sqrt(4 / 4 / 3) = 1 / sqrt(3)
NODES: dict[str, list[float]] = {
    # Weights of B, E: softmax(log 3, 0) = 3/4, 1/4. The root's are not read.
    "entropy": [9.0, 0.0, np.log(3.0), 0.0, 0.0, 0.0, 0.0],
    "visits": [0, 3, 1, 1, 4, 3, 1],
    "judged": [9, 1, -1, 0, 0, 1, 0],
}
PLAIN: dict[str, Any] = {"whiten": False}
NO_NORM: dict[str, Any] = {"overall_norm": "none"}

#: name -> (recipe, its arguments behind tree and R, by name, the answer)
ANSWERS: dict[str, tuple[Any, dict[str, Any], Rows]] = {
    # R - mean R = 1/2, -1/2, 1/2, -1/2; V(n) - V(p): A 1/6, B -1/6, C 1/2, D -1/2 (first token), E 1/3, F -1/2.
    "tempo": (
        lambda tree, r: recipes.tempo(tree, None, r),
        {},
        [
            [2 / 3 * ROOT3, 1 / 3 * ROOT3, ROOT3],
            [-1 / 3 * ROOT3, -2 / 3 * ROOT3, -ROOT3, -0.5 * ROOT3],
            [2 / 3 * ROOT3, 5 / 6 * ROOT3],
            [-ROOT3],
        ],
    ),
    "tvm": (recipes.tvm, {}, by_node(2 / 3, 1 / 2, 1, 0, 1, 0)),
    # Of the children's means: A 3/4 - 3/8, B 1/2 - 3/4, C 1 - 1/2, D 0 - 1/2, E 1 - 3/4, F 0 - 3/8.
    "spo_tree": (recipes.spo_tree, PLAIN, by_node(0.375, -0.25, 0.5, -0.5, 0.25, -0.375)),
    # Two siblings are one std (ddof 0) from their mean.
    "spo_tree, grpo": (recipes.spo_tree, {"variant": "grpo", **PLAIN}, by_node(1, -1, 1, -1, 1, -1)),
    "treerpo": (recipes.treerpo, {"eps": 0.0}, by_node(S, -S, S, -S, S, -S)),
    # Half of their distances: A, F 3/8, B, E 1/4, C, D 1/2.
    "treerpo, centred": (recipes.treerpo, {"scale": "none"}, by_node(0.375, -0.25, 0.5, -0.5, 0.25, -0.375)),
    # gamma 1/2. B (1/2 + 0) / 2 = 1/4 < E 1; A (1/4 + 0 + 1/2) / 3 = 1/4 > F 0. Step rewards put E (1 - 2) below B,
    # and A (1/4 - 1) below F. Trajectories: +-1/2 sqrt(3), weight 1; forks weigh 2.
    "portool": (
        recipes.portool,
        {"gamma": 0.5, "fork_weight": 2.0, "eps": 0.0},
        [
            [ROOT3 / 2 + 2 * S, ROOT3 / 2 - 2 * S, ROOT3 / 2 + 2 * S],
            [-ROOT3 / 2 + 2 * S, -ROOT3 / 2 - 2 * S, -ROOT3 / 2 - 2 * S, -ROOT3 / 2 - 2 * S],
            [ROOT3 / 2 + 2 * S, ROOT3 / 2 + 2 * S],
            [-ROOT3 / 2 - 2 * S],
        ],
    ),
    "portool, steps": (
        recipes.portool,
        {"gamma": 0.5, "step_rewards": [0, -1, 0, 0, 0, -2, 0], "trajectory_weight": 0.0, "eps": 0.0},
        by_node(-S, S, S, -S, -S, S),
    ),
    # V(B) = (1 + 0) / 2, V(A) = 3/4 V(B) + 1/4 V(E) = 5/8, V(root) = (5/8 + 0) / 2 = 5/16.
    "at2po": (recipes.at2po, {"entropy": "entropy", "normalize": False}, by_node(0.625, 0.5, 1, 0, 1, 0)),
    # (R - 1/2) / (1/2 + 1e-6) = 2 R - 1, and so is every value.
    "at2po, normalised": (recipes.at2po, {"entropy": "entropy"}, by_node(0.25, 0, 1, -1, 1, -1)),
    "at2po, parent": (
        recipes.at2po,
        {"entropy": "entropy", "normalize": False, "advantage": "diff_parent"},
        by_node(0.3125, -0.125, 0.5, -0.5, 0.375, -0.3125),
    ),
    "at2po, global": (
        recipes.at2po,
        {"entropy": "entropy", "normalize": False, "advantage": "diff_global"},
        by_node(0.3125, 0.1875, 0.6875, -0.3125, 0.6875, -0.3125),
    ),
    "at2po, both": (
        recipes.at2po,
        {"entropy": "entropy", "normalize": False, "advantage": "diff_localglobal"},
        by_node(0.625, 0.0625, 1.1875, -0.8125, 1.0625, -0.625),
    ),
    "at2po, leaves": (
        recipes.at2po,
        {"node_value": "leaf_mean", "normalize": False},
        by_node(2 / 3, 1 / 2, 1, 0, 1, 0),
    ),
    # A 1 above F 0, B -1 below E 1, C and D alike.
    "slate": (lambda tree, r, step: recipes.slate(tree, step), {"step": "judged"}, by_node(S, -S, 0, 0, S, -S)),
    # Shared nodes: root (4, V 1/2), A (3, V 2/3), B (2, V 1/2). Rows 0, 1: (2 + 2 + 1) / 9 = 5/9; row 2: (2 + 2) / 7.
    "treepo": (
        recipes.treepo,
        PLAIN,
        [[4 / 9] * 3, [-5 / 9] * 4, [3 / 7] * 2, [-1 / 2]],
    ),
    # Rows 0, 1: (1/2 + 2/3 + 1/2) / 3 = 5/9; row 2: (1/2 + 2/3) / 2 = 7/12.
    "treepo, average": (
        recipes.treepo,
        {"weighting": "average", **PLAIN},
        [[4 / 9] * 3, [-5 / 9] * 4, [5 / 12] * 2, [-1 / 2]],
    ),
    # The last node counts too: rows 1 - 6/10, 0 - 5/10, 1 - 5/8, 0 - 2/5 = 0.4, -0.5, 0.375, -0.4.
    # B (0.4 - 0.5) / 2 = -0.05, A (-0.05 + 0.375) / 2 = 0.1625, root 0.
    "treepo_segment": (recipes.treepo_segment, PLAIN, by_node(0.1625, -0.2125, 0.45, -0.45, 0.2125, -0.4)),
    # eta 1/2: B -0.05 - A / 4, C 0.4 - B / 2, D -0.5 - B / 2; row 2 ends earlier: E 0.375 - A / 2.
    "treepo_segment, eta": (
        recipes.treepo_segment,
        {"eta": 0.5, **PLAIN},
        by_node(0.1625, -0.090625, 0.425, -0.475, 0.29375, -0.4),
    ),
    # V is 1 or -1 of two siblings: A 1, F -1, B -1, E 1, C 1, D -1.
    "treepo_segment, norm": (recipes.treepo_segment, {"sibling_norm": True, **PLAIN}, by_node(1, -2, 2, 0, 0, -1)),
    # R - mean of the others' = 2/3, -2/3, 2/3, -2/3; V: C 2/3, D -2/3, B 0, E 2/3, A 2/9, F -2/3, root 0.
    "treerl": (recipes.treerl, NO_NORM, by_node(2 / 9, -2 / 9, 2 / 3, -2 / 3, 4 / 9, -2 / 3)),
    "treerl, state": (
        recipes.treerl,
        {"reward": "state_value", **NO_NORM},
        by_node(4 / 9, -2 / 9, 4 / 3, -4 / 3, 10 / 9, -4 / 3),
    ),
    "treerl, value": (
        recipes.treerl,
        {"reward": "value_only", **NO_NORM},
        by_node(2 / 9, 0, 2 / 3, -2 / 3, 2 / 3, -2 / 3),
    ),
    # B (0 - 2/9 + 0) / 2, C (2/3 + 4/9 + 2/3) / 3 = 16/27, D (-2/3 - 8/9 - 2/3) / 3 = -20/27, E (4/9 + 2/3) / 2.
    "treerl, ancestors": (
        recipes.treerl,
        {"reward": "mix_all_ancestors", **NO_NORM},
        by_node(2 / 9, -1 / 9, 16 / 27, -20 / 27, 5 / 9, -2 / 3),
    ),
    # Sums over nodes: of V times sequences 2/3 (A) + 0 + 2/3 - 2/3 + 2/3 - 2/3 = 2/3, of sequences 4 + 3 + 2 + 4 = 13.
    "treerl, step": (
        recipes.treerl,
        {"reward": "value_only", "overall_norm": "step"},
        by_node(2 / 9 - 2 / 39, -2 / 39, 2 / 3 - 2 / 39, -2 / 3 - 2 / 39, 2 / 3 - 2 / 39, -2 / 3 - 2 / 39),
    ),
    # D has two tokens: 2/3 + 0 + 2/3 - 4/3 + 2/3 - 2/3 = 0.
    "treerl, token": (recipes.treerl, {"reward": "value_only"}, by_node(2 / 9, 0, 2 / 3, -2 / 3, 2 / 3, -2 / 3)),
    "treerl, sqrt": (
        recipes.treerl,
        {"reward": "value_only", "reweight": "sqrt", **NO_NORM},
        by_node(2 / 9 / ROOT3, 0, 2 / 3, -2 / 3, 2 / 3, -2 / 3),
    ),
    # Labels log(1 + 10 V) / log 11: A 0.849446 over F 0; B 0.747222 under E 1; C 1 over D 0. Halves of the distances
    # 0.849446, 0.252778, 1 by sqrt(2) of them + 1e-4: 0.706990, 0.706710, 0.707007.
    "propa": (recipes.propa, {}, by_node(0.706990, -0.706711, 0.707007, -0.707007, 0.706711, -0.706990)),
    "propa, range": (recipes.propa, {"min_range": 0.3}, by_node(0.706990, 0, 0.707007, -0.707007, 0, -0.706990)),
    # Steps to a correct end: C 1, B 2, E 1, A 2 (through E), root 3; D has B's 2, F the root's 3.
    # A 0 + 1/2, B 1/2 + 1/2 / 2, C 3/4 + 1/4, D 3/4 - 1/4 / 2, E 1/2 + 1/2, F max(0, -1/3).
    "rest_mcts": (recipes.rest_mcts, {}, by_node(0.5, 0.75, 1, 0.625, 1, 0)),
    # B (1 * 1 + 4 * 0) / 5, A (1 * 0.2 + 3 * 1) / 4.
    "mcts_step_values": (recipes.mcts_step_values, {"visits": "visits"}, by_node(0.8, 0.2, 1, 0, 1, 0)),
    "mcts_step_values, max": (recipes.mcts_step_values, {"backup": "max"}, by_node(1, 1, 1, 0, 1, 0)),
    # Prefixes B, B, A and the root.
    "tree_opo": (recipes.tree_opo, {}, [[1 / 2] * 3, [-1 / 2] * 4, [1 / 3] * 2, [-1 / 2]]),
    "tree_opo, max": (recipes.tree_opo, {"baseline": "max"}, [[0] * 3, [-1] * 4, [0] * 2, [-1]]),
    "tree_opo, min": (recipes.tree_opo, {"baseline": "min"}, [[1] * 3, [0] * 4, [1] * 2, [0]]),
    # Prefix A (2/3) for all but the last.
    "tree_opo, prefix": (
        recipes.tree_opo,
        {"prefix": [1, 1, 1, 0]},
        [[1 / 3] * 3, [-2 / 3] * 4, [1 / 3] * 2, [-1 / 2]],
    ),
}


def padded(rows: Rows, columns: int = 4) -> Tensor:
    return torch.tensor([row + [0.0] * (columns - len(row)) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("name", ANSWERS)
def test_drawn(name: str) -> None:
    recipe, given, want = ANSWERS[name]
    options = {k: NODES[v] if isinstance(v, str) and v in NODES else v for k, v in given.items()}
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    near(recipe(drawn(), torch.tensor(R), **options), padded(want), 4e-6)


def test_diffusion_tree_drawn() -> None:
    """B log((e + 1) / 2), A log((e^B + e) / 2), root log((e^A + 1) / 2); without the halves: sums of e, 1."""
    e = np.e
    b, a, root = (e + 1) / 2, ((e + 1) / 2 + e) / 2, (((e + 1) / 2 + e) / 2 + 1) / 2
    near(recipes.diffusion_tree(drawn(), torch.tensor(R)), [*np.log([root, a, b]), 1, 0, 1, 0])
    near(
        recipes.diffusion_tree(drawn(), torch.tensor(R), form="sum"),
        [*np.log([2 * e + 2, 2 * e + 1, e + 1]), 1, 0, 1, 0],
    )


def test_tree_grpo_drawn() -> None:
    """Two trees of one prompt, R = 1, 0 and 0, 0: mean 1/4, std sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2."""
    tree = PrefixTree(torch.tensor([[1], [2], [3], [4]]), group_ids=["t", "t", "u", "u"])
    r = torch.tensor([1.0, 0.0, 0.0, 0.0])
    near(recipes.tree_grpo(tree, r, group_size=4, eps=0.0).squeeze(1)[:2], [1.5 + S, -0.5 - S])
    got = recipes.tree_grpo(tree, r, group_size=4)  # 0 / 0 with eps = 0
    near(got.squeeze(1), [1.5 + S, -0.5 - S, -0.5, -0.5], 4e-6)
    near(recipes.tree_grpo(tree, r, group_size=4, sequential=True).squeeze(1), [S, -S, 0, 0], 4e-6)


def test_rose_drawn() -> None:
    """Two families that both branch at position 4.

    0: six tokens, R = 1; 1 leaves it at 2 (4 tokens, R = 0), 2 at 4 (8 tokens, R = 1).
    3: five tokens, R = 0; 4 leaves it at 4 (5 tokens, R = 1).
    Means below: root 3/5; [0, 2) of 0, 1, 2: 2/3; [2, 4) of 0, 2: 1; [0, 4) of 3, 4: 1/2. By position: 2 as it is,
    4 is (1 + 1 + 0 + 1) / 4 = 3/4.
    """
    parent, position = torch.tensor([-1, 0, 0, -1, 3]), torch.tensor([0, 2, 4, 0, 4])
    tree = PrefixTree.from_branches(parent, position, torch.tensor([6, 4, 8, 5, 5]))
    r = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    first, second = 2 / 3 - 3 / 5, 1 - 2 / 3
    near(
        recipes.rose(tree, r),
        padded(
            [
                [first] * 2 + [second] * 2 + [0] * 2,
                [first] * 2 + [-2 / 3] * 2,
                [first] * 2 + [second] * 2 + [0] * 4,
                [-0.1] * 4 + [-0.5],
                [-0.1] * 4 + [0.5],
            ],
            8,
        ),
    )
    keyed = 3 / 4 - 2 / 3
    near(
        recipes.rose(tree, r, position_keyed=True),
        padded(
            [
                [first] * 2 + [keyed] * 2 + [0.25] * 2,
                [first] * 2 + [-2 / 3] * 2,
                [first] * 2 + [keyed] * 2 + [0.25] * 4,
                [0.15] * 4 + [-0.75],
                [0.15] * 4 + [0.25],
            ],
            8,
        ),
    )
    # 4 is the shortest correct one: 0 has f = 1 - 5/6, 2 has 1 - 5/8, from the root on.
    near(
        recipes.rose(tree, r, length_penalty=1.0),
        padded(
            [
                [first * 5 / 6] * 2 + [second * 5 / 6] * 2 + [0] * 2,
                [first] * 2 + [-2 / 3] * 2,
                [first * 5 / 8] * 2 + [second * 5 / 8] * 2 + [0] * 4,
                [-0.1] * 4 + [-0.5],
                [-0.1] * 4 + [0.5],
            ],
            8,
        ),
    )
    # By position they share 4: f = 1 - 1/2 and 1 - 1/4, behind it.
    near(
        recipes.rose(tree, r, length_penalty=1.0, position_keyed=True),
        padded(
            [
                [first] * 2 + [keyed] * 2 + [0.25 / 2] * 2,
                [first] * 2 + [-2 / 3] * 2,
                [first] * 2 + [keyed] * 2 + [0.25 / 4] * 4,
                [0.15] * 4 + [-0.75],
                [0.15] * 4 + [0.25],
            ],
            8,
        ),
    )


def test_rose_of_a_response_that_ends_where_another_goes_on() -> None:
    """Row 0 ends at 2, where row 1 goes on: its last segment is worth its own R - 1/2, the other's mean - 1/2 = 0."""
    tree = PrefixTree(torch.tensor([[1, 2, 0], [1, 2, 3]]), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    near(recipes.rose(tree, torch.tensor([0.0, 1.0])), [[-0.5, -0.5, 0], [0, 0, 0.5]])


def test_treerl_fills_in() -> None:
    """Steps 1 and 2 of row 0 follow each other with no fork between them: V - V(p) is 0 at the second."""
    tree = PrefixTree.from_paths([["a", "b"], ["c"]])
    r = torch.tensor([1.0, 0.0])  # against the other: 1, -1
    near(recipes.treerl(tree, r, overall_norm="none"), [[1, 1], [-1, 0]])
    near(recipes.treerl(tree, r, overall_norm="none", fill_in=False), [[1, 0], [-1, 0]])


def test_arpo_branch() -> None:
    """0.6 - 0.5 (0.5 - 0.2) = 0.45; 0.6; 0.2 + 0.5 * 0.8 = 0.6; 1.0 - 0.5 clipped to 0.5, the threshold itself."""
    now, first = torch.tensor([0.5, 0.2, 0.0, 1.0]), torch.tensor([0.2, 0.2, 0.8, 0.0])
    got = recipes.arpo_branch(now, first, uniform=torch.tensor([0.6, 0.6, 0.2, 1.0]))
    assert got.tolist() == [True, False, False, True]
    draws = [recipes.arpo_branch(now, first, generator=torch.Generator().manual_seed(i)) for i in range(400)]
    # u <= 0.5 + 0.5 (H - H_initial): 0.65, 0.5, 0.1, 1
    share = torch.stack(draws).double().mean(0)
    torch.testing.assert_close(share, torch.tensor([0.65, 0.5, 0.1, 1.0]).double(), rtol=0, atol=0.08)
    assert torch.equal(draws[3], recipes.arpo_branch(now, first, generator=torch.Generator().manual_seed(3)))


# -------------------------------------------------------------------------------------------------------------- whiten
@pytest.mark.parametrize("recipe", [recipes.spo_tree, recipes.treepo, recipes.treepo_segment])
def test_whitened_over_the_credited_tokens(recipe: Any) -> None:
    mask = torch.arange(4) < torch.tensor(LENGTHS).unsqueeze(1)
    raw = recipe(drawn(), torch.tensor(R), whiten=False)
    assert torch.equal(recipe(drawn(), torch.tensor(R)), fr.whiten(raw, mask))


# --------------------------------------------------------------------------------------------------------------- edges
ZERO = {"tempo", "slate", "at2po", "spo_tree", "spo_tree, grpo", "rose", "rose, penalty", "rose, keyed", "propa"}


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_is_compared_and_finite_at_the_edges(name: str) -> None:
    alone = PrefixTree(torch.tensor([[1, 2], [1, 3], [4, 5]]), group_ids=[0, 1, 2])
    same = PrefixTree(torch.tensor([[1, 2], [1, 2], [1, 3]]))
    empty = PrefixTree(torch.tensor([[1, 2], [1, 2]]), torch.zeros(2, 2))
    none = PrefixTree(torch.zeros(0, 3, dtype=torch.int64), group_ids=[])
    for tree in (alone, same, empty, none):
        for value in (0.0, 1.0):
            got = EVERY[name](tree, torch.full((tree.num_rows,), value))
            assert got.isfinite().all()
            assert got.shape == tree.shape
            if tree is same and name in ZERO:
                assert torch.equal(got, torch.zeros_like(got)), "equal rewards tell nothing apart"


def test_every_recipe_of_the_family_is_compared() -> None:
    compared = {name.partition(",")[0] for name in EVERY} | {"diffusion_tree", "arpo_branch"}
    assert compared == {r.name for r in recipes.RECIPES.values() if r.family == "tree"}


def test_masked_branch_token_gets_no_difference() -> None:
    """The token where they part is tool output: what is left is GRPO's advantage."""
    tokens = torch.tensor([[1, 2, 3], [1, 4, 5]])
    got = recipes.tempo(tokens, torch.tensor([[1, 0, 1], [1, 0, 1]]), torch.tensor([1.0, 0.0]), group_size=2)
    near(got, [[S, 0, S], [-S, 0, -S]], 4e-6)


# ------------------------------------------------------------------------------------------------------------ plumbing
def test_rewards_of_other_kinds() -> None:
    want = recipes.tvm(drawn(), torch.tensor(R))
    for r in (torch.tensor(R).double(), torch.tensor(R).long(), torch.tensor(R) > 0, torch.tensor(R).half()):
        assert torch.equal(recipes.tvm(drawn(), r), want)


def test_arrays_go_in_and_come_out() -> None:
    for recipe in (recipes.treerl, recipes.spo_tree, recipes.diffusion_tree, recipes.rose):
        got = recipe(drawn(), np.array(R, np.float32))
        assert isinstance(got, np.ndarray)
        assert np.array_equal(got, recipe(drawn(), torch.tensor(R)).numpy())
    tokens, mask = np.array(DRAWN), np.arange(4) < np.array(LENGTHS)[:, None]
    got = recipes.tempo(tokens, mask, np.array(R), group_size=4)
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, recipes.tempo(drawn(), None, torch.tensor(R)).numpy())
    branch = recipes.arpo_branch(np.zeros(2), np.zeros(2), uniform=np.array([0.4, 0.6]))
    assert branch.tolist() == [True, False]


def _nodes(value: float) -> Tensor:
    return torch.full((7,), value)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: recipes.tvm(torch.tensor(DRAWN), torch.tensor(R)), "tree: expected a fastreward.PrefixTree, got Tensor"),
    (lambda: recipes.slate(torch.tensor(DRAWN), torch.tensor(R)), "tree: expected a fastreward.PrefixTree"),
    (lambda: recipes.tvm(drawn(), torch.tensor(R[:3])), "rewards: expected shape"),
    (lambda: recipes.tvm(drawn(), R), "rewards: expected a torch tensor"),
    (lambda: recipes.tvm(drawn(), torch.tensor([1.0, float("inf"), 0.0, 0.0])), r"rewards: .* got inf at index \[1\]"),
    (lambda: recipes.tempo(torch.tensor(DRAWN), None, torch.tensor(R)), "group_ids, group_size: expected exactly one"),
    (lambda: recipes.tempo(drawn(), None, torch.tensor(R), group_size=2), "group_size: expected None beside"),
    (lambda: recipes.tempo(drawn(), torch.ones(4, 4), torch.tensor(R)), "mask: expected None beside"),
    (lambda: recipes.spo_tree(drawn(), torch.tensor(R), variant="ppo"), "variant: expected one of"),
    (lambda: recipes.spo_tree(drawn(), torch.tensor(R), old_logprobs=torch.zeros(4)), "old_logprobs: expected shape"),
    (lambda: recipes.portool(drawn(), torch.tensor(R), gamma=0.0), "gamma: expected a positive"),
    (lambda: recipes.portool(drawn(), torch.tensor(R), op="sum"), "op: expected one of"),
    (lambda: recipes.portool(drawn(), torch.tensor(R), step_rewards=torch.ones(4)), "step_rewards: expected shape"),
    (lambda: recipes.at2po(drawn(), torch.tensor(R)), "entropy: needed"),
    (lambda: recipes.at2po(drawn(), torch.tensor(R), node_value="max"), "node_value: expected one of"),
    (lambda: recipes.at2po(drawn(), torch.tensor(R), advantage="td"), "advantage: expected one of"),
    (lambda: recipes.treepo(drawn(), torch.tensor(R), weighting="size"), "weighting: expected one of"),
    (lambda: recipes.treepo_segment(drawn(), torch.tensor(R), eta=-1.0), "eta: expected a positive"),
    (lambda: recipes.tree_grpo(drawn(), torch.tensor(R)), "group_ids, group_size: expected exactly one"),
    (lambda: recipes.treerl(drawn(), torch.tensor(R), reward="td"), "reward: expected one of"),
    (lambda: recipes.treerl(drawn(), torch.tensor(R), overall_norm="all"), "overall_norm: expected one of"),
    (lambda: recipes.treerl(drawn(), torch.tensor(R), reweight="all"), "reweight: expected one of"),
    (
        lambda: recipes.treerl(drawn(), torch.tensor(R), reweight="sqrt", selected=torch.ones(3)),
        "selected: expected shape",
    ),
    (
        lambda: recipes.treerl(drawn(), torch.tensor(R), reweight="sqrt", selected=[True] * 4),
        "selected: expected a torch",
    ),
    (lambda: recipes.treerl(drawn(), torch.tensor(R), selected=torch.ones(4)), "selected: needs reweight"),
    (
        lambda: recipes.propa(drawn(), torch.tensor(R), visits=torch.tensor([1, 1, -1, 0])),
        "visits: expected numbers >= 0",
    ),
    (lambda: recipes.propa(drawn(), torch.tensor(R), boost=0.0), "boost: expected a positive"),
    (lambda: recipes.mcts_step_values(drawn(), torch.tensor(R), _nodes(0.0)), "visits: expected numbers above 0"),
    (lambda: recipes.mcts_step_values(drawn(), torch.tensor(R), backup="sum"), "backup: expected one of"),
    (lambda: recipes.diffusion_tree(drawn(), torch.tensor(R), scale=0.0), "scale: expected a positive"),
    (lambda: recipes.diffusion_tree(drawn(), torch.tensor(R), form="max"), "form: expected one of"),
    (lambda: recipes.tree_opo(drawn(), torch.tensor(R), baseline="median"), "baseline: expected one of"),
    (
        lambda: recipes.tree_opo(drawn(), torch.tensor(R), prefix=torch.tensor([0, 7, 0, 0])),
        r"prefix: .* at index \[1\]",
    ),
    (lambda: recipes.tree_opo(drawn(), torch.tensor(R), prefix=torch.zeros(4)), "prefix: expected an integer"),
    (lambda: recipes.arpo_branch(torch.zeros(3), torch.zeros(2)), "initial_entropy: expected shape"),
    (lambda: recipes.arpo_branch(torch.zeros(3), torch.zeros(3), uniform=torch.zeros(2)), "uniform: expected shape"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
