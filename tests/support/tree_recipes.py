"""Recipes over prefix trees, beside the same written out, on random forests of three kinds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from reference_losses import tree as reference
from reference_losses.tree import Forest
from torch import Tensor

from fastreward import PrefixTree, recipes

SEEDS = range(12)
Rows = list[list[float]]


# --------------------------------------------------------------------------------------------------------------- data
def rewards(rng: random.Random, count: int) -> list[float]:
    """Right or wrong, graded, or all the same."""
    kind = rng.choice(["binary", "binary", "graded", "equal"])
    if kind == "equal":
        return [rng.choice([0.0, 1.0])] * count
    return [float(rng.randrange(2)) if kind == "binary" else round(rng.uniform(-1, 2), 3) for _ in range(count)]


def groups_of(rng: random.Random, count: int) -> list[int]:
    """Not contiguous, some of them with one sequence."""
    return [rng.randrange(max(1, count // 4)) for _ in range(count - 1)] + [99]


def tokens_forest(seed: int) -> tuple[PrefixTree, Forest, list[float]]:
    """Sequences over three tokens: ragged, doubled, prefixes of each other, empty, with tokens that get no credit."""
    rng = random.Random(seed)
    count, columns = rng.randrange(2, 14), rng.randrange(1, 9)
    sequences: list[list[int]] = []
    for _ in range(count):
        if sequences and rng.random() < 0.3:
            other = rng.choice(sequences)
            sequences.append(other[: rng.randrange(len(other) + 1)] if rng.random() < 0.5 else list(other))
        else:
            sequences.append([rng.randrange(3) for _ in range(rng.randrange(columns + 1))])
    credit = [[t < len(s) and (t == len(s) - 1 or rng.random() < 0.8) for t in range(columns)] for s in sequences]
    groups = groups_of(rng, count)
    padded = torch.tensor([s + [7] * (columns - len(s)) for s in sequences])
    tree = PrefixTree(padded, torch.tensor(credit), groups)
    return tree, reference.forest(sequences, groups, credit), rewards(rng, count)


def steps_forest(seed: int) -> tuple[PrefixTree, Forest, list[float]]:
    """Paths of steps, a node each; one to three tokens a step, and tokens of no step between them."""
    rng = random.Random(100 + seed)
    count, depth = rng.randrange(2, 12), rng.randrange(1, 5)
    paths = [[rng.randrange(2 + d) for d in range(rng.randrange(depth + 1))] for _ in range(count)]
    groups = groups_of(rng, count)
    columns = 3 * depth + 2
    place = []
    for path in paths:
        row = [-1] * rng.randrange(2)
        for step in range(len(path)):
            row += [step] * rng.randrange(1, 4)
        place.append((row + [-1] * columns)[:columns])
    segments = torch.tensor(place)
    credit = [[p >= 0 and rng.random() < 0.9 for p in row] for row in place]
    ids = torch.tensor([path + [-1] * (depth - len(path)) for path in paths])
    tree = PrefixTree.from_paths(ids, groups, segment_ids=segments, mask=torch.tensor(credit))
    return tree, reference.forest(paths, groups, credit, place=place, compress=False), rewards(rng, count)


def branches_forest(seed: int) -> tuple[PrefixTree, Forest, list[float], list[int], list[int]]:
    """Responses that branch off others, each behind its parent's own branch position; several roots in a group."""
    rng = random.Random(200 + seed)
    parent: list[int] = []
    position: list[int] = []
    lengths: list[int] = []
    groups: list[int] = []
    for b in range(rng.randrange(2, 14)):
        length = rng.randrange(1, 9)
        p = rng.randrange(-1, b) if b else -1
        k = 0 if p < 0 else rng.randrange(position[p], lengths[p] + 1)
        parent.append(p)
        position.append(k)
        lengths.append(max(length, k))
        groups.append(rng.randrange(3) if p < 0 else groups[p])
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    tree = PrefixTree.from_branches(*(torch.tensor(x) for x in (parent, position, lengths)), groups, mask=mask)
    f = reference.forest(reference.branched(parent, position, lengths), groups, mask.tolist())
    return tree, f, rewards(rng, len(parent)), parent, position


#: name -> (recipe, reference, options of both)
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "tvm": (recipes.tvm, reference.tvm, {}),
    "spo_tree": (recipes.spo_tree, reference.spo_tree, {"whiten": False}),
    "spo_tree, grpo": (recipes.spo_tree, reference.spo_tree, {"variant": "grpo", "whiten": False}),
    "treerpo": (recipes.treerpo, reference.treerpo, {}),
    "treerpo, centred": (recipes.treerpo, reference.treerpo, {"scale": "none"}),
    "treerpo, biased": (recipes.treerpo, reference.treerpo, {"ddof": 0, "eps": 0.1}),
    "portool": (recipes.portool, reference.portool, {}),
    "portool, max": (recipes.portool, reference.portool, {"gamma": 0.5, "op": "max"}),
    "treepo": (recipes.treepo, reference.treepo, {"whiten": False}),
    "treepo, average": (recipes.treepo, reference.treepo, {"weighting": "average", "whiten": False}),
    "treepo, skip": (recipes.treepo, reference.treepo, {"skip_constant": True, "whiten": False}),
    "treepo_segment": (recipes.treepo_segment, reference.treepo_segment, {"whiten": False}),
    "treepo_segment, eta": (recipes.treepo_segment, reference.treepo_segment, {"eta": 0.7, "whiten": False}),
    "treepo_segment, norm": (recipes.treepo_segment, reference.treepo_segment, {"sibling_norm": True, "whiten": False}),
    "propa": (recipes.propa, reference.propa, {}),
    "propa, plain": (recipes.propa, reference.propa, {"boost": None, "min_range": 0.4}),
    "rest_mcts": (recipes.rest_mcts, reference.rest_mcts, {}),
    "mcts_step_values": (recipes.mcts_step_values, reference.mcts_step_values, {}),
    "mcts_step_values, max": (recipes.mcts_step_values, reference.mcts_step_values, {"backup": "max"}),
    "tree_opo": (recipes.tree_opo, reference.tree_opo, {}),
    "tree_opo, max": (recipes.tree_opo, reference.tree_opo, {"baseline": "max"}),
    "tree_opo, min": (recipes.tree_opo, reference.tree_opo, {"baseline": "min"}),
    "treerl": (recipes.treerl, reference.treerl, {}),
    "treerl, step": (recipes.treerl, reference.treerl, {"overall_norm": "step", "reward": "state_value"}),
    "treerl, sqrt": (
        recipes.treerl,
        reference.treerl,
        {"overall_norm": "none", "reweight": "sqrt", "reward": "state_value"},
    ),
    "treerl, uniform": (recipes.treerl, reference.treerl, {"reweight": "uniform", "reward": "value_only"}),
    "treerl, ancestors": (recipes.treerl, reference.treerl, {"reward": "mix_all_ancestors"}),
    "treerl, one generation": (recipes.treerl, reference.treerl, {"average_one_generation": True}),
    "treerl, not filled": (recipes.treerl, reference.treerl, {"fill_in": False, "overall_norm": "none"}),
}
EVERY: dict[str, Callable[[PrefixTree, Tensor], Tensor]] = {
    **{name: (lambda tree, r, c=case: c[0](tree, r, **c[2])) for name, case in CASES.items()},  # type: ignore[misc]
    "tempo": lambda tree, r: recipes.tempo(tree, None, r),
    "slate": lambda tree, r: recipes.slate(tree, torch.ones(tree.num_nodes)),
    "at2po": lambda tree, r: recipes.at2po(tree, r, entropy=torch.ones(tree.num_nodes)),
    "tree_grpo": lambda tree, r: recipes.tree_grpo(tree, r, group_ids=[0] * tree.num_rows),
    "tree_grpo, sequential": lambda tree, r: recipes.tree_grpo(tree, r, group_size=1, sequential=True),
    "rose": recipes.rose,
    "rose, penalty": lambda tree, r: recipes.rose(tree, r, length_penalty=0.5),
    "rose, keyed": lambda tree, r: recipes.rose(tree, r, length_penalty=0.5, position_keyed=True),
}
