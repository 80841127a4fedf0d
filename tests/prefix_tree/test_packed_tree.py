"""PrefixTree.pack: the layout, its bins, attention masks, log-probs, other packages' forms, and training on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreward as fr
from fastreward import PrefixTree
from fastreward.bench import peers
from fastreward.bench.cases import _areal
from fastreward.prefix_tree.packed import PackedTree

VOCAB = 11


def random_batch(seed: int, rows: int = 12, columns: int = 9, groups: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, mask, group_ids): few tokens, so that prefixes are shared; ragged, duplicates, holes in the mask."""
    draw = random.Random(seed)
    tokens = torch.tensor([[draw.randrange(3) for _ in range(columns)] for _ in range(rows)]).reshape(rows, columns)
    lengths = [draw.randrange(columns + 1) for _ in range(rows)]
    for row in range(1, rows):
        if draw.random() < 0.2:
            tokens[row], lengths[row] = tokens[row - 1], lengths[row - 1]
    mask = torch.arange(columns) < torch.tensor(lengths).reshape(rows, 1)
    mask &= torch.tensor([[draw.random() < 0.8 for _ in range(columns)] for _ in range(rows)]).reshape(rows, columns)
    return tokens, mask, torch.tensor([draw.randrange(groups) for _ in range(rows)])


def sequences_of(tree: PrefixTree, tokens: Tensor) -> list[list[int]]:
    return [tokens[b, :n].tolist() for b, n in enumerate(tree.lengths.tolist())]


def prefixes(packed: PackedTree) -> list[tuple[int, ...]]:
    """The tokens down to each packed token, by its parents."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(packed.token_ids.tolist(), packed.parent.tolist(), strict=True):
        found.append((found[parent] if parent >= 0 else ()) + (token,))
    return found


# -------------------------------------------------------------------------------------------------------- the layout
@pytest.mark.parametrize("seed", range(4))
def test_the_reference_packs_alike(seed: int) -> None:
    batch, packed = random_batch(seed), []
    for backend in ("cpu", "reference"):
        with fr.backend(backend):
            packed.append(PrefixTree(*batch).pack())
    for name in ("token_ids", "position_ids", "parent", "tin", "tout", "multiplicity", "packed_of_token"):
        assert torch.equal(*(getattr(p, name) for p in packed)), name
    assert (packed[0].position_ids == 0).sum() > 3  # several trees: a first token has no parent in any of them


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("options", [{}, {"max_tokens": 9}, {"max_tokens": 14}, {"max_tokens": 11, "by": "row"}])
def test_layout_holds_every_sequence_once(seed: int, options: dict[str, Any]) -> None:
    tokens, mask, group_ids = random_batch(seed)
    tree = PrefixTree(tokens, mask, group_ids)
    packed = tree.pack(**options)
    sequences = sequences_of(tree, tokens)
    seen: list[int] = []
    for part in packed.bins():
        assert part.num_bins == 1
        assert len(part) <= options.get("max_tokens", len(part))
        seen += part.rows.tolist()
        paths, place = prefixes(part), part.packed_of_token
        groups = group_ids[part.rows].tolist()
        # Every token of every sequence has a place whose prefix is its own; places are shared within a group alone.
        owners: dict[int, set[tuple[int, tuple[int, ...]]]] = {}
        for b, row in enumerate(part.rows.tolist()):
            for t in range(len(sequences[row])):
                prefix = tuple(sequences[row][: t + 1])
                assert paths[place[b, t]] == prefix
                owners.setdefault(int(place[b, t]), set()).add((groups[b], prefix))
            assert (place[b, len(sequences[row]) :] == -1).all()
        assert sorted(owners) == list(range(len(part)))
        assert all(len(keys) == 1 for keys in owners.values())
        assert len({next(iter(keys)) for keys in owners.values()}) == len(part)
        assert part.position_ids.tolist() == [len(path) - 1 for path in paths]
        assert part.multiplicity.tolist() == [int((place == k).sum()) for k in range(len(part))]
        assert (tokens[part.rows][part.row, part.column] == part.token_ids).all()
        assert (place[part.row, part.column] == torch.arange(len(part))).all()
        for k, path in enumerate(paths):  # a subtree is an interval
            below = [q for q, other in enumerate(paths) if other[: len(path)] == path and _above(part, q, k)]
            assert below == list(range(k, int(part.tout[k])))
    assert sorted(seen) == list(range(len(tokens)))
    assert packed.cu_bins.tolist() == [0, *torch.tensor([len(p) for p in packed.bins()]).cumsum(0).tolist()]


def _above(packed: PackedTree, q: int, k: int) -> bool:
    while q > k:
        q = int(packed.parent[q])
    return q == k


@pytest.mark.parametrize("seed", range(10))
def test_groups_that_fit_stay_whole(seed: int) -> None:
    tokens, mask, group_ids = random_batch(seed, rows=30, groups=8)
    tree = PrefixTree(tokens, mask, group_ids)
    packed = tree.pack(40)
    for group in range(8):
        rows = group_ids == group
        if rows.any() and PrefixTree(tokens[rows], mask[rows]).num_tokens <= 40:
            assert len(packed.bin_of_row[rows].unique()) == 1
    assert len(packed) == sum(
        PrefixTree(tokens[group_ids == g], mask[group_ids == g]).num_tokens for g in group_ids.unique()
    )


def test_a_group_that_is_too_long_is_cut_between_neighbours() -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7], [8, 8, 8, 8]])
    packed = PrefixTree(tokens).pack(6)
    assert packed.bin_of_row.tolist() == [0, 0, 1, 2]  # 5 tokens; 4 with the prefix again; 4
    assert packed.token_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 8, 8, 8]
    assert packed.multiplicity.tolist() == [2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert packed.cu_bins.tolist() == [0, 5, 9, 13]


def test_first_fit_fills_earlier_bins() -> None:
    lengths = [5, 4, 3, 2]
    tokens = torch.arange(20).reshape(4, 5)
    packed = PrefixTree(tokens, group_size=1, lengths=lengths).pack(8)
    assert packed.bin_of_row.tolist() == [0, 1, 0, 1]


def test_packed_input_and_left_padding() -> None:
    flat = torch.tensor([1, 2, 3, 1, 2, 4, 4, 9])
    packed = PrefixTree(flat, cu_seqlens=torch.tensor([0, 3, 7, 8])).pack(5)
    for part in packed.bins():
        assert (flat_of(part, flat)[part.column] == part.token_ids).all()
    padded = torch.tensor([[0, 0, 1, 2, 3], [0, 0, 1, 2, 4]])
    tree = PrefixTree(padded, attention_mask=padded != 0)
    assert tree.pack().token_ids.tolist() == [1, 2, 3, 4]
    assert tree.pack().column.tolist() == [2, 3, 4, 4]
    assert tree.pack().position_ids.tolist() == [0, 1, 2, 2]
    assert tree.pack().predicting_index.tolist() == [[-1, -1, -1, 0, 1], [-1, -1, -1, 0, 1]]


def flat_of(part: PackedTree, flat: Tensor) -> Tensor:
    starts = torch.tensor([0, 3, 7, 8])
    return torch.cat([flat[starts[b] : starts[b + 1]] for b in part.rows.tolist()])


def test_empty_batches() -> None:
    for tree in (
        PrefixTree(torch.zeros(0, 4, dtype=torch.int64)),
        PrefixTree(torch.ones(3, 4, dtype=torch.int64), torch.zeros(3, 4)),
    ):
        packed = tree.pack()
        assert len(packed) == 0
        assert packed.num_bins == 1
        assert packed.to_tokens(torch.zeros(0)).shape == tree.shape
        assert packed.attention_mask().shape == (1, 1, 0, 0)
        assert tree.pack(3).num_bins == 1


def test_bad_arguments() -> None:
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4]])
    tree = PrefixTree(tokens)
    with pytest.raises(ValueError, match=r"max_tokens: expected room for the longest sequence, got 2 for 3 \(row 0\)"):
        tree.pack(2)
    with pytest.raises(ValueError, match="by: expected one of 'group', 'row'"):
        tree.pack(by="tree")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pack: expected a tree of whole token sequences"):
        PrefixTree(tokens, torch.tensor([[1, 0, 1], [1, 1, 1]]), ignore_masked=True).pack()
    with pytest.raises(ValueError, match="pack: expected a tree of whole token sequences"):
        PrefixTree.from_paths(tokens).pack()
    packed = tree.pack()
    with pytest.raises(ValueError, match=r"logits: expected shape \[4, V\]"):
        packed.token_logprobs(torch.zeros(3, VOCAB))
    with pytest.raises(ValueError, match=r"token_ids: expected integers in \[0, 3\)"):
        packed.token_logprobs(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"packed_values: expected shape \[4\]"):
        packed.to_tokens(torch.zeros(5))
    with pytest.raises(ValueError, match="to_areal: expected a tree of one group, got 2"):
        PrefixTree(tokens, group_size=1).pack().to_areal()
    with pytest.raises(ValueError, match="trl_row: expected one bin, got 2"):
        PrefixTree(tokens, group_size=1).pack(3).trl_row(torch.zeros(2))


# ------------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block", [1, 4, 16, 128])
def test_block_lists_are_those_of_the_mask(seed: int, block: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    tokens, mask, group_ids = random_batch(seed)
    packed = PrefixTree(tokens, mask, group_ids).pack()
    n = len(packed)
    ours = packed.block_mask(block)
    theirs = create_block_mask(packed.mask_mod(block), 1, 1, n, n, device="cpu", BLOCK_SIZE=block)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.seq_lengths == (n, n)
    # A block that is listed as full is full.
    dense = torch.nn.functional.pad(packed.attention_mask()[0, 0], (0, -n % block, 0, -n % block))
    counts, indices = ours.full_kv_num_blocks, ours.full_kv_indices
    assert counts is not None
    assert indices is not None
    for q in range(counts.shape[-1]):
        for kv in indices[0, 0, q, : counts[0, 0, q]].tolist():
            assert dense[q * block : (q + 1) * block, kv * block : (kv + 1) * block].all()


def test_mask_is_the_ancestors() -> None:
    tokens, mask, group_ids = random_batch(3)
    packed = PrefixTree(tokens, mask, group_ids).pack()
    seen = packed.attention_mask()[0, 0]
    for q in range(len(packed)):
        path = [q]
        while packed.parent[path[-1]] >= 0:
            path.append(int(packed.parent[path[-1]]))
        assert seen[q].nonzero().flatten().tolist() == sorted(path)


# --------------------------------------------------------------------------------------------------------- log-probs
def written_out(packed: PackedTree, logits: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) in the batch's shape: each sequence's own softmax rows."""
    tokens, place = packed.token_ids, packed.packed_of_token
    predicting = packed.predicting_index
    rows = (logits / temperature).log_softmax(-1)
    there = (predicting >= 0) & (mask != 0)
    chosen = rows[predicting.clamp(min=0), tokens[place.clamp(min=0)]]
    entropy = -(rows.exp() * rows.masked_fill(rows == -torch.inf, 0.0)).sum(-1)[predicting.clamp(min=0)]
    return torch.where(there, chosen, 0.0), torch.where(there, entropy, 0.0)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_row_with_four_children(inplace: bool) -> None:
    """What flows into its logsumexp is added up over all of them."""
    tokens = torch.tensor([[1, 0], [1, 1], [1, 2], [1, 3]])
    packed = PrefixTree(tokens, group_size=4).pack()
    logits = torch.randn(len(packed), 5)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    stats = packed.token_logprobs(ours * 1.0 if inplace else ours, temperature=0.7, inplace_backward=inplace)
    upstream = torch.tensor([[0.0, 1.0], [0.0, 10.0], [0.0, 100.0], [0.0, 1000.0]])
    (packed.to_tokens(stats.logprobs) * upstream).sum().backward()
    want, _ = written_out(packed, truth, torch.ones(4, 2), 0.7)
    (want * upstream).sum().backward()
    assert ours.grad is not None
    assert truth.grad is not None
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_gradients(seed: int, inplace: bool, temperature: float) -> None:
    tokens, mask, group_ids = random_batch(seed)
    packed = PrefixTree(tokens, mask, group_ids).pack()
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(packed), VOCAB, generator=generator)
    upstream = [torch.randn(tokens.shape, generator=generator) for _ in range(2)]
    ours = logits.clone().requires_grad_()
    handed = ours * 1.0 if inplace else ours
    stats = packed.token_logprobs(
        handed, temperature=temperature, outputs=("logprobs", "entropy"), inplace_backward=inplace
    )
    got = [packed.to_tokens(x) for x in stats]
    sum((x * w).sum() for x, w in zip(got, upstream, strict=True)).backward()  # type: ignore[union-attr]
    truth = logits.double().requires_grad_()
    want = written_out(packed, truth, mask, temperature)
    sum((x * w).sum() for x, w in zip(want, upstream, strict=True)).backward()  # type: ignore[union-attr]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y.float(), atol=2e-6, rtol=1e-6)
    assert ours.grad is not None
    assert truth.grad is not None
    torch.testing.assert_close(ours.grad, truth.grad.float(), atol=3e-6, rtol=1e-5)


def test_extreme_logits() -> None:
    """-inf for a first child, large logits for a second, bfloat16."""
    tokens = torch.tensor([[0, 1, 2], [0, 3, 2], [0, 4, 2]])
    packed = PrefixTree(tokens).pack()
    logits = torch.zeros(len(packed), VOCAB)
    logits[0, 1], logits[0, 3], logits[0, 4] = -torch.inf, 5.0, -torch.inf
    got = packed.to_tokens(packed.token_logprobs(logits).logprobs)
    want, _ = written_out(packed, logits.double(), torch.ones_like(tokens), 1.0)
    torch.testing.assert_close(got, want.float())
    large = torch.randn(len(packed), VOCAB) + 1e4
    got = packed.to_tokens(packed.token_logprobs(large).logprobs)
    want, _ = written_out(packed, large.double(), torch.ones_like(tokens), 1.0)
    torch.testing.assert_close(got, want.float(), atol=2e-6, rtol=1e-6)
    half = torch.randn(len(packed), VOCAB).bfloat16().requires_grad_()
    packed.token_logprobs(half).logprobs.sum().backward()
    truth = half.detach().double().requires_grad_()
    exact = truth.log_softmax(-1)[packed.parent.clamp(min=0), packed.token_ids]
    (exact * (packed.parent >= 0)).sum().backward()
    assert half.grad is not None
    assert truth.grad is not None
    torch.testing.assert_close(half.grad.double(), truth.grad, atol=2**-8, rtol=2**-7)


def test_rows_that_nobody_needs_are_not_read() -> None:
    tokens, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 0, 0, 1]])
    packed = PrefixTree(tokens, mask).pack()
    logits = torch.full((4, VOCAB), torch.nan)
    logits[2] = 0.0
    logits.requires_grad_()
    logprobs = packed.token_logprobs(logits).logprobs
    assert logprobs.tolist() == pytest.approx([0, 0, 0, -torch.log(torch.tensor(VOCAB)).item()])
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad[[0, 1, 3]].eq(0).all()


def test_op_is_well_behaved() -> None:
    from fastreward.prefix_tree.packed_logprobs import _children, _packed_token_logprobs, further_children

    tokens, mask, group_ids = random_batch(1)
    packed = PrefixTree(tokens, mask, group_ids).pack()
    logits = torch.randn(len(packed), VOCAB, requires_grad=True)
    labels, read, rows, ids = _children(packed, further_children(packed))
    assert len(rows) > 0
    args = (logits, labels, read, rows, ids, 1.0, None, 0, False, "cpu")
    torch.library.opcheck(_packed_token_logprobs._overload, args)
    one = _packed_token_logprobs(*args)[1].sum()
    (grad,) = torch.autograd.grad(one, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------------- other packages
def _fields(node: Any) -> tuple[Any, ...]:
    return (
        node.tree_id, node.start_idx, node.end_idx, list(node.tokens), list(node.sequence_ids),
        list(node.children), [(a.start_idx, a.end_idx) for a in node.ancestors],
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("max_tokens", [12, 30, 1000])
def test_areal_tries_are_its_own(seed: int, max_tokens: int) -> None:
    try:
        areal = _areal.tree_module()
    except peers.Absent as reason:
        pytest.skip(f"areal: {reason} (`make test` installs it)")
    tokens, mask, _ = random_batch(seed, rows=20)
    lengths = torch.tensor([max(n, 1) for n in PrefixTree(tokens, mask).lengths.tolist()])
    there = torch.arange(tokens.shape[1]) < lengths[:, None]
    theirs, sizes = areal._greedy_build_tries({"input_ids": tokens, "attention_mask": there}, max_tokens)
    packed = PrefixTree(tokens, there).pack(max_tokens, by="row")
    assert [len(part) for part in packed.bins()] == sizes
    ours = packed.to_areal(areal.TrieNode)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert type(mine) is type(other)
        assert [_fields(n) for n in (mine, *mine.nodes)] == [_fields(n) for n in (other, *other.nodes)]
        assert mine.all_sequence_ids == other.all_sequence_ids
        assert torch.equal(areal.trie_to_parent_array(mine, 64), areal.trie_to_parent_array(other, 64))


def trl_packing(tokens: Tensor, mask: Tensor, group_ids: Tensor, lengths: Tensor) -> dict[str, list[int]]:
    """What TRL's tree packing gives: a forest of dicts, walked depth first, and the flat loss terms."""
    roots: dict[int, dict[int, Any]] = {}
    paths = []
    for b, n in enumerate(lengths.tolist()):
        level, path = roots.setdefault(int(group_ids[b]), {}), []
        for token in tokens[b, :n].tolist():
            node = level.setdefault(token, {"token": token, "next": {}, "place": -1})
            path.append(node)
            level = node["next"]
        paths.append(path)
    out: dict[str, list[int]] = {name: [] for name in ("input_ids", "position_ids", "tree_enter", "tree_leave")}

    def walk(level: dict[int, Any], depth: int) -> None:
        for node in level.values():
            node["place"] = len(out["input_ids"])
            out["input_ids"].append(node["token"])
            out["position_ids"].append(depth)
            out["tree_enter"].append(node["place"])
            out["tree_leave"].append(-1)
            walk(node["next"], depth + 1)
            out["tree_leave"][node["place"]] = len(out["input_ids"])

    for root in roots.values():
        walk(root, 0)
    out |= {"pred_index": [], "target_id": [], "segment_id": []}
    for b, path in enumerate(paths):
        for t in range(1, len(path)):
            if mask[b, t]:
                out["pred_index"].append(path[t - 1]["place"])
                out["target_id"].append(path[t]["token"])
                out["segment_id"].append(b)
    return out


@pytest.mark.parametrize("seed", range(12))
def test_trl_row(seed: int) -> None:
    tokens, mask, group_ids = random_batch(seed)
    tree = PrefixTree(tokens, mask, group_ids)
    advantages, old = torch.randn(len(tokens)), torch.randn(tokens.shape)
    row = tree.pack().trl_row(advantages, old)
    want = trl_packing(tokens, mask, group_ids, tree.lengths)
    for name, values in want.items():
        assert row[name].tolist() == values, name
    assert row["tree_enter"].dtype == row["tree_leave"].dtype == torch.int32
    assert row["advantages"].tolist() == advantages[want["segment_id"]].tolist()
    counted = (mask != 0) & (torch.arange(tokens.shape[1]) >= 1)
    assert row["old_log_probs"].tolist() == old[counted].tolist()


# ---------------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def training() -> Any:
    return pytest.importorskip("fastreward.bench.cases._tree_training")


@pytest.mark.parametrize(("max_tokens", "bins"), [(None, 1), (160, 2), (120, 4)])  # 152 tokens a group
@pytest.mark.parametrize("loss", [fr.losses.ppo(), fr.losses.gspo()])
def test_training_on_the_tree_is_training_on_the_batch(
    training: Any, max_tokens: int | None, bins: int, loss: fr.losses.Loss
) -> None:
    """Loss and every parameter's gradient to 1e-5; the tokens that the packing saves are counted."""
    from fastreward.bench.cases._rollouts import rollouts

    data = rollouts(16, 48, 8, 0.6, "cpu")
    tokens, mask = data.tokens % 512, data.mask.clone()
    mask[:, :6] = False  # the prompt
    advantages = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    old = -5 + torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
    flat_model = training.small_model()
    logits = flat_model(input_ids=tokens).logits[:, :-1]
    logprobs = fr.token_logprobs(logits, tokens[:, 1:], mask=mask[:, 1:]).logprobs
    old[:, 1:] = logprobs.detach() + 0.1 * old[:, 1:] / 5 + 0.1
    flat = fr.policy_loss(
        logprobs, old[:, 1:], advantages[:, 1:], mask[:, 1:], loss=loss, aggregation="token-mean"
    ).loss
    want = torch.autograd.grad(flat, list(flat_model.parameters()))

    model = training.small_model()
    packed = PrefixTree(tokens, mask, data.group_ids, lengths=torch.full((16,), 48)).pack(max_tokens)
    assert packed.tokens == 16 * 48
    assert packed.num_bins == bins
    if max_tokens == 120:  # groups are cut, and their prefixes are there twice
        assert data.unique < len(packed) < packed.tokens
    else:
        assert len(packed) == data.unique
        assert 1 - len(packed) / packed.tokens == pytest.approx(0.6, abs=0.02)
    total = mask[:, 1:].sum()
    losses, grads = torch.zeros(()), [torch.zeros_like(p) for p in model.parameters()]
    for part in packed.bins():
        out = model(
            input_ids=part.token_ids[None], position_ids=part.position_ids[None], attention_mask=part.attention_mask()
        ).logits
        lp = part.to_tokens(part.token_logprobs(out).logprobs)[:, 1:]
        rows = part.rows
        value = (
            fr.policy_loss(
                lp, old[rows, 1:], advantages[rows, 1:], mask[rows, 1:], loss=loss, aggregation="token-sum"
            ).loss
            / total
        )
        losses = losses + value.detach()
        for grad, more in zip(grads, torch.autograd.grad(value, list(model.parameters())), strict=True):
            grad += more
    torch.testing.assert_close(losses, flat.detach(), atol=1e-5, rtol=1e-5)
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert max(g.abs().max() for g in want) > 1e-3  # the tolerance is not the size of the gradients


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_flex_attention_sees_what_the_sequences_see(training: Any) -> None:
    """Log-probs of the packed batch under FlexAttention (which has no backward on a CPU) are the flat batch's."""
    transformers = pytest.importorskip("transformers")
    from torch.nn.attention.flex_attention import flex_attention

    from fastreward.bench.cases._rollouts import rollouts

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float, **_: Any) -> Any:
        """As torch writes it out; transformers would compile it."""
        out = flex_attention(q, k, v, block_mask=attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("eager_flex", attend)
    data = rollouts(16, 48, 8, 0.6, "cpu")
    tokens = data.tokens % 512
    packed = PrefixTree(tokens, group_ids=data.group_ids).pack()
    with torch.no_grad():
        flat = fr.token_logprobs(training.small_model()(input_ids=tokens).logits[:, :-1], tokens[:, 1:]).logprobs
        inputs = {"input_ids": packed.token_ids[None], "position_ids": packed.position_ids[None]}
        logits = training.small_model("eager_flex")(**inputs, attention_mask=packed.block_mask(16)).logits
        got = packed.to_tokens(packed.token_logprobs(logits).logprobs)
    torch.testing.assert_close(got[:, 1:], flat, atol=1e-5, rtol=1e-5)


def test_loss_on_unique_tokens_weighted_by_multiplicity() -> None:
    """Where sequences that share a token agree in everything, its loss once, times their number, is the batch's."""
    tokens, mask, group_ids = random_batch(5)
    tree = PrefixTree(tokens, mask, group_ids)
    packed = tree.pack()
    generator = torch.Generator().manual_seed(0)
    logprobs = (-torch.rand(len(packed), generator=generator)).requires_grad_()
    old, advantages = logprobs.detach() + 0.3 * torch.randn(len(packed), generator=generator), torch.randn(len(packed))
    flat = fr.policy_loss(*(packed.to_tokens(x) for x in (logprobs, old, advantages)), mask)
    (want,) = torch.autograd.grad(flat.loss, logprobs)
    weights = packed.from_tokens(mask.float())  # multiplicity, of the sequences that give credit
    once = fr.policy_loss(
        logprobs[None], old[None], advantages[None], (weights > 0)[None], weights=weights[None],
        normalizer=float(mask.sum()), aggregation="token-sum",
    )  # fmt: skip
    (got,) = torch.autograd.grad(once.loss, logprobs)
    torch.testing.assert_close(once.loss, flat.loss)
    torch.testing.assert_close(got, want)


def test_doc_example() -> None:
    """The three lines of PackedTree's docstring, on a model that is a table."""
    table: Callable[[Tensor], Tensor] = torch.nn.Embedding(VOCAB, VOCAB)
    tokens, mask, group_ids = random_batch(2)
    packed = PrefixTree(tokens, mask, group_ids).pack()
    logprobs = packed.to_tokens(packed.token_logprobs(table(packed.token_ids[None])).logprobs)
    flat = table(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs[:, 1:], flat * mask[:, 1:])
