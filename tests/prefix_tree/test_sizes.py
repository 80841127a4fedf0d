"""PrefixTrees of 65,536 sequences and of ten million tokens: seconds and memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def measured(code: str) -> tuple[float, ...]:
    """What a fresh process prints; `grown()` there is by how many MiB its peak has grown since the last call."""
    head = """
        import resource, time, torch, fastreward as fr
        torch.set_num_threads(1)
        peak = 0
        def grown():
            global peak
            before, peak = peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            return peak - before
        def ratio(call, other, times=5):
            # Work of two calls in processor time, which waiting for a busy machine is not; each one's best, in turn.
            best = [1e9, 1e9]
            for k in times * (0, 1):
                begin = time.process_time()
                (call, other)[k]()
                best[k] = min(best[k], time.process_time() - begin)
            return best[0] / best[1]
        fr.PrefixTree(torch.zeros(2, 2, dtype=torch.int64))
    """
    source = textwrap.dedent(head) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(map(float, done.stdout.split()))


@pytest.mark.parametrize("alphabet", [2, 2**31 - 1])
def test_one_group_of_65536_sequences(alphabet: int) -> None:
    """A root with 65,536 children, and a tree of 130,000 branch points: work and memory linear in the rows.

    The same rows in 16 groups are the measure: a quadratic step would take a sixteenth there.
    """
    slower, memory, children, nodes = measured(
        f"""
        tokens = torch.randint(0, {alphabet}, (65536, 32), generator=torch.Generator().manual_seed(0))
        if {alphabet} > 65536:
            tokens[:, 0] = torch.arange(65536) * 30011
        grown()
        tree = fr.PrefixTree(tokens)
        memory = grown()
        slower = ratio(lambda: fr.PrefixTree(tokens), lambda: fr.PrefixTree(tokens, group_size=4096))
        print(slower, memory, int(tree.children[0]), tree.num_nodes)
        """
    )
    assert children == (2 if alphabet == 2 else nodes - 1)
    assert nodes > 65536 - 8
    assert slower < 6
    assert memory < 64  # MiB: 12 fields of 131,072 nodes are 12 of them, the tokens 16


@pytest.mark.slow
def test_ten_million_tokens() -> None:
    """As many bytes as the result and a few for each row; nothing for each token but what a token is asked for."""
    memory, spread = measured(
        """
        tokens = torch.randint(0, 50000, (5120, 2048), dtype=torch.int32)
        groups = tokens.view(640, 8, 2048)
        groups[:, 1:, :1200] = groups[:, :1, :1200]  # no memory of its own, which would hide what the build takes
        grown()
        tree = fr.PrefixTree(tokens, group_size=8)
        memory = grown()
        tree.to_tokens(tree.advantages(tree.aggregate(torch.randn(5120))))
        print(memory, grown())
        """
    )
    assert memory < 16
    assert spread < 64  # MiB: 40 of them are the tokens' advantages


def test_branches_off_each_other_65536_times() -> None:
    """Work linear in the rows where each one hangs off the one before it; the measure are 16 shorter such chains."""
    (slower,) = measured(
        """
        def comb(rows, groups):
            row = torch.arange(rows)
            parent = torch.where(row % (rows // groups) == 0, -1, row - 1)
            ones = torch.ones_like(parent)
            return fr.PrefixTree.from_branches(parent, ones, 2 * ones, group_size=rows // groups)
        assert (comb(4, 1).num_nodes, comb(4, 2).num_nodes) == (6, 8)
        print(ratio(lambda: comb(65536, 1), lambda: comb(65536, 16)))
        """
    )
    assert slower < 6
