"""PrefixTree: building with every array, credit, packing and a training step on the packed tree.

Groups of G multi-turn rollouts: every few turns each branch splits in two, so that a share of all tokens is shared with
an earlier sequence. SHAPE has 3.1M tokens; `--rows 512` has 786K and `--rows 64` has 98K.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreward.bench import peers, roofline
from fastreward.bench.case import OURS, PEERS, Case, Contender, Target
from fastreward.bench.cases import _areal
from fastreward.bench.cases._rollouts import Edges, Rollouts, rollouts
from fastreward.bench.cases._tree_training import training_case
from fastreward.prefix_tree import PrefixTree
from fastreward.verify.error import distance

CASES = (
    *(f"{what}-g{group}-{share}" for what in ("build", "credit") for group in (8, 64) for share in (30, 70)),
    "pack-g8-70",
    "pack-g64-70",
    "train-g8-70",
)
DTYPES = ("float32",)
SHAPE = (2048, 1536)  # rows, tokens of a row
QUICK = (128, 192)

_ALONE = f"{OURS}, one thread"
_DICT = "Python dict trie"
_AREAL = "areal"


def build(case: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Case:
    """`shape` is (rows, tokens of a row); the case's name says what is timed, G, and the share of tokens saved in %."""
    what, group, share = case.split("-")
    if what == "train":
        return _train(case, shape, device)
    data = rollouts(shape[0], shape[1], int(group[1:]), int(share) / 100, device)
    return {"build": _build, "credit": _credit, "pack": _pack}[what](case, shape, data)


# ------------------------------------------------------------------------------------------------------------- build
def _build(case: str, shape: tuple[int, ...], data: Rollouts) -> Case:
    def ours() -> PrefixTree:
        tree = PrefixTree(data.tokens, data.mask, data.group_ids, lengths=whole)
        tree.node_of_token  # noqa: B018  made when it is asked for
        return tree

    whole = torch.full((shape[0],), shape[1], device=data.tokens.device)
    design = [Target("per_token", 8.0, _ALONE)]
    built = Case(
        operation="prefix_tree",
        name=case,
        dtype="int64",
        shape=shape,
        traffic=roofline.prefix_tree_build(data.tokens.numel(), data.unique),
        error=lambda result: float(edges_of(result) != data.edges),
        contenders=[Contender(OURS, ours)],
        tolerance=0.0,
        inputs=[data.tokens, data.mask],
        targets=(*design, Target("speedup", 1.7, _ALONE), Target("speedup", 200.0, _AREAL)),
    )
    if data.tokens.device.type == "cpu":
        built.contenders.append(Contender(_ALONE, partial(alone, ours)))
        built.contenders.append(Contender(_DICT, partial(dict_trie, data)))
        peers.add(built, _AREAL, partial(_areal_contender, data))
    return _without_peers(built)


def edges_of(result: Any) -> Edges:
    """The nodes of a PrefixTree, of areal's tries, or of a dict trie, roots left out."""
    if isinstance(result, PrefixTree):
        fields = torch.stack([result.edge_start, result.edge_length, result.count], 1)[: result.num_nodes]
        return Counter((start, length, count) for start, length, count in fields.tolist() if length)
    if isinstance(result, tuple):
        nodes = [node for trie in result[0] for node in trie.nodes]
        return Counter((sum(len(a.tokens) for a in n.ancestors), len(n.tokens), len(n.sequence_ids)) for n in nodes)
    return _dict_edges(result)


def alone(call: Callable[[], Any]) -> Any:
    """The call on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


def dict_trie(data: Rollouts) -> list[dict[int, Any]]:
    """As it is written down first: for each group nested dicts, token -> [sequences, what follows]."""
    roots: dict[int, dict[int, Any]] = {}
    for group, row in zip(data.group_ids.tolist(), data.tokens.tolist(), strict=True):
        node = roots.setdefault(group, {})
        for token in row:
            entry = node.get(token)
            if entry is None:
                entry = node[token] = [0, {}]
            entry[0] += 1
            node = entry[1]
    return list(roots.values())


def _dict_edges(roots: list[dict[int, Any]]) -> Edges:
    edges: Edges = Counter()
    waiting = [(0, entry) for root in roots for entry in root.values()]
    while waiting:
        start, entry = waiting.pop()
        length, count = 1, entry[0]
        while len(entry[1]) == 1:
            (entry,) = entry[1].values()
            length += 1
        edges[start, length, count] += 1
        waiting.extend((start + length, child) for child in entry[1].values())
    return edges


def _areal_contender(data: Rollouts) -> Contender:
    """All in one trie: with more of them, areal walks each for every sequence."""
    builder = _areal.builder()
    batch = {"input_ids": data.tokens, "attention_mask": torch.ones_like(data.mask)}
    return Contender(_AREAL, lambda: builder(batch, data.tokens.numel()))


# ------------------------------------------------------------------------------------------------------------ credit
def _credit(case: str, shape: tuple[int, ...], data: Rollouts) -> Case:
    tree = PrefixTree(data.tokens, data.mask, data.group_ids)
    gathered = _gathered(tree, data.mask)
    truth = gathered(data.rewards.double())

    def ours() -> Tensor:
        return tree.to_tokens(tree.advantages(tree.aggregate(data.rewards)))

    built = Case(
        operation="prefix_tree",
        name=case,
        dtype="float32",
        shape=shape,
        traffic=roofline.prefix_tree_credit(data.tokens.numel()),
        error=lambda result: distance(result.cpu(), truth.cpu()),
        contenders=[Contender(OURS, ours)],
        tolerance=1e-5,
        inputs=[data.mask],
        targets=(Target("share", 0.5),),
    )
    if data.tokens.device.type == "cpu":
        built.contenders.append(Contender(_ALONE, partial(alone, ours)))
    # The tree's arrays given, what is left is gather and scatter; on this many tokens that is memory's time.
    built.contenders.append(Contender("torch eager", partial(gathered, data.rewards), tolerance=1e-3))
    return _without_peers(built)


def _gathered(tree: PrefixTree, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Mean below each node by sums over prefix intervals, minus the parent's, gathered: plain torch, given the tree."""
    node = tree.node_of_token.long()
    leaf, order = tree.leaf.sort(stable=True)
    begin = torch.searchsorted(leaf, tree.tin)  # of each node's sequences in `order`

    def credit(rewards: Tensor) -> Tensor:
        sums = torch.nn.functional.pad(rewards[order].cumsum(0), (1, 0))
        mean = (sums[begin + tree.count] - sums[begin]) / tree.count.clamp(min=1)
        td = torch.where(tree.parent >= 0, mean - mean[tree.parent.clamp(min=0)], 0.0)
        return torch.where(mask & (node >= 0), td[node.clamp(min=0)], 0.0)

    return credit


# -------------------------------------------------------------------------------------------------------------- pack
def _pack(case: str, shape: tuple[int, ...], data: Rollouts) -> Case:
    tree = PrefixTree(data.tokens, data.mask, data.group_ids)
    whole = PrefixTree(data.tokens, group_ids=data.group_ids)
    expected = data.tokens.flatten()

    def ours() -> Any:
        packed = tree.pack()
        packed.packed_of_token  # noqa: B018  made when it is asked for
        return packed

    def wrong(packed: Any) -> float:
        place = packed.tree.unique_of_token.flatten()
        found = packed.token_ids[place.clamp(min=0)]
        return float(((found != expected) & (place >= 0)).any() or len(packed) != tree.num_tokens)

    built = Case(
        operation="prefix_tree",
        name=case,
        dtype="int64",
        shape=shape,
        traffic=roofline.prefix_tree_pack(data.tokens.numel(), whole.num_tokens),
        error=wrong,
        contenders=[Contender(OURS, lambda: _fresh(tree, ours))],
        tolerance=0.0,
        inputs=[data.tokens, data.mask],
    )
    if data.tokens.device.type == "cpu":
        built.contenders.append(Contender(_ALONE, partial(alone, lambda: _fresh(tree, ours))))
    return _without_peers(built)


def _fresh(tree: PrefixTree, call: Callable[[], Any]) -> Any:
    """The call, with nothing kept from the last one."""
    tree.__dict__.pop("unique_of_token", None)
    return call()


def _without_peers(case: Case) -> Case:
    """The reason of each usual peer that has no row."""
    reasons = dict.fromkeys(PEERS, "has no trees") | {
        "TRL": "has no trees (an open pull request)",
        "torch eager": "has no operation for it",
        "torch.compile": "the number of nodes depends on the data",
    }
    for contender in case.contenders:
        reasons.pop(contender.name, None)
    case.absent = reasons | case.absent
    return case


# ------------------------------------------------------------------------------------------------------------- train
def _train(case: str, shape: tuple[int, ...], device: str) -> Case:
    """A small Qwen2, one step of PPO's loss: on the unique tokens, and on the batch as it is."""
    _, group, share = case.split("-")
    return _without_peers(training_case(case, shape, int(group[1:]), int(share) / 100, device))
