"""`fastreward plot`, through the command line, and the files that it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastreward._arguments import check
from fastreward.cli import app
from fastreward.prefix_tree import plot, rollouts

_RUNNER = CliRunner()
_TABLE: dict[str, Any] = {
    "tokens": [[1, 2, 3, 4], [7, 8, 9], [1, 2, 5]],
    "rewards": [1.0, 0.25, 0.0],
    "group_ids": ["a", "b", "a"],
    "mask": [[1, 1, 1, 1], [1, 1, 0], [0, 1, 1]],
    "texts": [["one ", "two ", "three ", "four"], ["seven ", "eight ", "nine"], ["one ", "two ", "five"]],
}
_PADDED = _TABLE | {
    "tokens": [[1, 2, 3, 4], [7, 8, 9, 0], [1, 2, 5, 0]],
    "mask": [[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]],
    "texts": [["one ", "two ", "three ", "four"], ["seven ", "eight ", "nine", ""], ["one ", "two ", "five", ""]],
}


def _run(*arguments: str | Path) -> Any:
    return _RUNNER.invoke(app, ["plot", "tree", *map(str, arguments)])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of the pictures that a test has drawn: in files texts are outlines."""
    whole, axes = plot.plot, []

    def kept(*arguments: Any, **options: Any) -> Any:
        axes.append(whole(*arguments, **options))
        return axes[-1]

    monkeypatch.setattr(plot, "plot", kept)
    return axes


def _texts(ax: Any) -> dict[str, str]:
    return {text.get_gid(): text.get_text() for text in ax.texts}


def _refusal(result: Any) -> str:
    """The message of a refused call in one line, out of its frame."""
    assert result.exit_code == 2, result.output
    return re.sub(r"[\s│]+", " ", re.sub(r"[╭╰╮╯─]", "", result.output))


def _records(table: dict[str, Any] = _TABLE) -> list[dict[str, Any]]:
    names = {"rewards": "reward", "group_ids": "group"}
    count = len(table["tokens"])
    return [{names.get(name, name): column[b] for name, column in table.items()} for b in range(count)]


def _write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def _lines(path: Path) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in _records()) + "\n\n", encoding="utf-8")
    return path


def _npz(path: Path) -> Path:
    np.savez(path, **{name: np.array(column) for name, column in _PADDED.items()})
    return path


def _tensors(path: Path) -> Path:
    tensors = {name: torch.tensor(_PADDED[name]) for name in ("tokens", "rewards", "mask")}
    torch.save(_PADDED | tensors, path)
    return path


def _records_of_tensors(path: Path) -> Path:
    torch.save([record | {"tokens": torch.tensor(record["tokens"])} for record in _records()], path)
    return path


_FILES: dict[str, Callable[[Path], Path]] = {
    "records.json": lambda path: _write_json(path, _records()),
    "table.json": lambda path: _write_json(path, _TABLE),
    "records.jsonl": _lines,
    "table.npz": _npz,
    "table.pt": _tensors,
    "records.pt": _records_of_tensors,
}


# ------------------------------------------------------------------------------------------------------- the command
def test_without_a_file_it_draws_the_example(tmp_path: Path) -> None:
    out = tmp_path / "tree.png"
    result = _run("--out", out)
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert str(out) in result.output
    cells = {row[1].strip(): row[2].strip() for line in result.output.splitlines() if len(row := line.split("│")) == 4}
    tree = rollouts.example().tree()
    assert cells["sequences"] == "8"
    assert cells["distinct sequences"] == "7"
    assert cells["tokens"] == str(int(tree.lengths.sum()))
    assert cells["nodes"] == str(tree.num_nodes)


def test_the_picture_of_the_example_is_complete(tmp_path: Path, drawn: list[Any]) -> None:
    out = tmp_path / "tree.svg"
    assert _run("--out", out).exit_code == 0
    table = rollouts.example()
    tree, texts = table.tree(), _texts(drawn[0])
    values = tree.aggregate(table.rewards)
    svg = out.read_text(encoding="utf-8")
    for n, (value, advantage) in enumerate(zip(values.tolist(), tree.advantages(values).tolist(), strict=True)):
        assert texts[f"value-{n}"] == plot._short(value)
        if n:
            assert texts[f"advantage-{n}"] == plot._short(advantage, "+")
            assert f"tokens-{n}" in texts
            assert svg.count(f'id="edge-{n}"') == 1
            assert svg.count(f'id="tokens-{n}"') == 1
    assert {"What is 17 × 6 ?", "I guess", "96", "rows 3, 4: reward 1"} <= set(texts.values())
    assert drawn[0].get_title(loc="left") == (
        "8 sequences, 156 tokens, 47 unique (69.9% saved), 6 branch points\nvalue: mean of the rewards, advantage: td"
    )


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_kinds_of_pictures(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"picture{ending}"
    assert _run("--out", out).exit_code == 0
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert out.read_bytes().startswith(begins[ending])


@pytest.mark.parametrize("name", _FILES)
def test_every_kind_of_file(tmp_path: Path, drawn: list[Any], name: str) -> None:
    """Row 1's last token is masked out, and so not part of its sequence."""
    path, out = _FILES[name](tmp_path / name), tmp_path / "tree.svg"
    table = rollouts.read(path)
    assert table.tokens.tolist() == _PADDED["tokens"]
    assert table.rewards.tolist() == _TABLE["rewards"]
    assert table.groups == _TABLE["group_ids"]
    assert table.mask is not None
    assert table.mask.tolist() == [[bool(x) for x in row] for row in _PADDED["mask"]]
    assert table.decode is not None
    assert table.decode([1, 2, 5]) == "one two five"
    assert table.tree().lengths.tolist() == [4, 2, 3]

    result = _run(path, "--out", out, "--group", "b", "--op", "max", "--mode", "root")
    assert result.exit_code == 0, result.output
    assert drawn[0].get_title(loc="left").splitlines() == [
        "group b: 1 sequence, 2 tokens, 2 unique (0.0% saved), 0 branch points",
        "value: max of the rewards, advantage: root",
    ]
    assert {"seven eight", "row 1: reward 0.25"} <= set(_texts(drawn[0]).values())
    assert "group b of 2 groups" in result.output


def test_options_reach_the_tree(tmp_path: Path, drawn: list[Any]) -> None:
    path = _write_json(tmp_path / "t.json", {"tokens": [[1, 2], [1, 3], [1, 3]], "rewards": [1, 4, 7]})
    for op, mode, values, advantages in (
        ("mean", "td", ("4.00", "1.00", "5.50"), ("0", "-3.00", "+1.50")),
        ("max", "td", ("7.00", "1.00"), ("-6.00", "0")),
        ("mean", "sibling", ("4.00", "1.00", "5.50"), ("0", "-0.71", "+0.71")),
    ):
        assert _run(path, "--op", op, "--mode", mode, "--out", tmp_path / "t.svg").exit_code == 0
        texts = _texts(drawn[-1])
        written = {kind: {t for gid, t in texts.items() if gid.startswith(kind)} for kind in ("value", "adv", "tokens")}
        assert written == {"value": set(values), "adv": set(advantages), "tokens": {"1", "2", "3"}}


def test_the_first_group_is_drawn_by_default(tmp_path: Path, drawn: list[Any]) -> None:
    path = _write_json(tmp_path / "t.json", {"tokens": [[1], [2], [3]], "rewards": [0, 1, 2], "group_ids": [7, 3, 7]})
    assert _run(path, "--out", tmp_path / "t.svg").exit_code == 0
    assert drawn[0].get_title(loc="left").startswith("group 7: 2 sequences,")
    assert _run(path, "--out", tmp_path / "t.svg", "--group", "3").exit_code == 0
    assert drawn[1].get_title(loc="left").startswith("group 3: 1 sequence,")


def test_a_tokenizer_from_a_folder(tmp_path: Path, drawn: list[Any]) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "moon": 2, "[UNK]": 3}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    path = _write_json(tmp_path / "t.json", {"tokens": [[0, 1, 1, 1], [0, 2, 2, 2]], "rewards": [0, 1]})
    assert _run(path, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "t.svg").exit_code == 0
    assert {"hello", "world world world", "moon moon moon"} <= set(_texts(drawn[0]).values())
    bad = _write_json(tmp_path / "bad.json", {"tokens": [[-5]], "rewards": [0]})
    refused = _refusal(_run(bad, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "t.svg"))
    assert "the tokenizer can't decode [-5]" in refused
    assert "expected a folder with a tokenizer" in _refusal(_run("--tokenizer", tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "no tokenizer that loads" in _refusal(_run("--tokenizer", tmp_path / "empty"))


def test_refused_options(tmp_path: Path) -> None:
    out = tmp_path / "tree.png"
    cases: list[tuple[list[str | Path], str]] = [
        (["--op", "meen"], "--op: expected one of 'mean', 'sum'"),
        (["--mode", "dt"], "--mode: expected one of 'td'"),
        (["--group", "b"], "group: expected one of 0, got 'b'"),
        (["--max-nodes", "3"], "max_nodes: group 0 has 14 nodes, more than the 3 that are drawn"),
    ]
    for arguments, message in cases:
        assert message in _refusal(_run(*arguments, "--out", out))
    assert not out.exists()
    assert "expected a file that ends in .png, .svg, .pdf" in _refusal(_run("--out", tmp_path / "tree.gif"))
    assert "--out: there is no folder" in _refusal(_run(tmp_path / "nowhere.json", "--out", tmp_path / "no" / "t.png"))
    assert "--out: expected a file, got the folder" in _refusal(_run("--out", tmp_path))
    assert "No such file or directory" in _refusal(_run(tmp_path / "nowhere.json", "--out", out))
    empty = _write_json(tmp_path / "empty.json", [])
    assert "no sequences to draw" in _refusal(_run(empty, "--out", out))


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in _refusal(_run("--out", tmp_path / "tree.png"))


def test_plot_alone_lists_what_it_draws() -> None:
    result = _RUNNER.invoke(app, ["plot"])
    assert "tree" in result.output
    assert "prefix tree" in result.output


# ------------------------------------------------------------------------------------------------------------- files
def test_lengths_and_their_absence() -> None:
    """A sequence is as long as `lengths` say, else as its mask, else as its list."""
    tokens: dict[str, Any] = {"tokens": [[1, 2, 3], [1, 2]], "rewards": [0, 1]}
    assert rollouts.rollouts(tokens).tree().lengths.tolist() == [3, 2]
    mask: dict[str, Any] = {"mask": [[1, 0, 0], [0, 1]]}
    assert rollouts.rollouts(tokens | mask).tree().lengths.tolist() == [1, 2]
    lengths: dict[str, Any] = {"lengths": [2, 0]}
    assert rollouts.rollouts(tokens | lengths).tree().lengths.tolist() == [2, 0]
    assert rollouts.rollouts(tokens | mask | lengths).tree().lengths.tolist() == [2, 0]


def test_groups_of_any_name() -> None:
    table = {"tokens": [[1], [2], [1]], "rewards": [0, 1, 2], "group_ids": ["x", None, "x"]}
    table = rollouts.rollouts(table)
    assert table.group_names == ["x", "None"]
    assert table.tree().statistics().groups == 2
    assert rollouts.rollouts({"tokens": [[1]], "rewards": [0]}).group_names == ["0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", r"expected a list of records or a table \(a dictionary\), got str"),
        ([1], "record 0: expected a dictionary, got int"),
        ([{"tokens": [1], "rewards": 1}], "record 0: expected the keys tokens, reward, .*, got 'rewards'"),
        ([{"tokens": [1]}], "record 0: expected the key 'reward', which is not there"),
        ({"rewards": [1]}, "expected the key 'tokens', which is not there"),
        ({"tokens": [[1]], "rewards": [1], "groups": [1]}, "expected the keys tokens, rewards, .*, got 'groups'"),
        (
            [{"tokens": [1], "reward": 0}, {"tokens": [1], "reward": 0, "group": 1}],
            "record 0: expected the key 'group', as other records have it",
        ),
        ({"tokens": [1, 2], "rewards": [1, 2]}, "tokens: expected a list of token ids for sequence 0, got 1"),
        ({"tokens": 3, "rewards": [1]}, "tokens: expected a list, got int"),
        ({"tokens": [[1], [2.5]], "rewards": [1, 2]}, "tokens: expected token ids for sequence 1, got 2.5"),
        ({"tokens": [[True]], "rewards": [1]}, "tokens: expected token ids for sequence 0, got True"),
        ({"tokens": [[2**63]], "rewards": [1]}, "tokens: expected token ids for sequence 0, got 9223372036854775808"),
        ({"tokens": [[1]], "rewards": [1, 2]}, "rewards: expected one entry for each of the 1 sequences, got 2"),
        ({"tokens": [[1]], "rewards": 5}, "rewards: expected a list, got int"),
        ({"tokens": [[1]], "rewards": ["1"]}, "rewards: expected finite numbers, got '1'"),
        ({"tokens": [[1]], "rewards": [float("nan")]}, "rewards: expected finite numbers, got nan"),
        ({"tokens": [[1]], "rewards": [1], "group_ids": [[1]]}, "group_ids: expected strings or numbers, got a list"),
        ({"tokens": [[1]], "rewards": [1], "group_ids": []}, "group_ids: expected one entry for each of the 1"),
        (
            {"tokens": [[1, 2]], "rewards": [1], "mask": [[1]]},
            "mask: expected 2 entries for sequence 0, its tokens, got 1",
        ),
        ({"tokens": [[1]], "rewards": [1], "mask": [["x"]]}, "mask: expected 0s and 1s for sequence 0, got 'x'"),
        ({"tokens": [[1]], "rewards": [1], "mask": [1]}, "mask: expected a list of 0s and 1s for sequence 0, got 1"),
        ({"tokens": [[1]], "rewards": [1], "texts": [[5]]}, "texts: expected strings for sequence 0, got 5"),
        (
            {"tokens": [[1], [1]], "rewards": [1, 1], "texts": [["a"], ["b"]]},
            "texts: expected one text for token 1, got 'a' and, in sequence 1, 'b'",
        ),
        (
            {"tokens": [[1]], "rewards": [1], "lengths": [2]},
            "lengths: expected at most the 1 tokens of sequence 0, got 2",
        ),
        ({"tokens": [[1]], "rewards": [1], "lengths": [-1]}, "lengths: expected at most the 1 tokens of sequence 0"),
        ({"tokens": [[1]], "rewards": [1], "lengths": [0.5]}, "lengths: expected integers, got 0.5"),
    ],
)
def test_refused_contents(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rollouts.rollouts(content)
    path = tmp_path / "bad.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"bad\.pt: {message}"):
        rollouts.read(path)


def test_refused_files(tmp_path: Path) -> None:
    def written(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    single = tmp_path / "single.npy"
    np.save(single, np.zeros(3))
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, tokens=np.array([[1], [2, 3]], dtype=object), rewards=np.zeros(2))
    code = tmp_path / "code.pt"
    torch.save({"tokens": Path("anything")}, code)
    cases = [
        (written("a.csv", b"1,2"), "expected a file that ends in .json, .jsonl, .npz, .pt, got '.csv'"),
        (written("noending", b""), "expected a file that ends in .json, .jsonl, .npz, .pt, got 'no ending'"),
        (written("a.json", b"{"), "not a .json file that can be read"),
        (written("b.json", b"\xff\xfe\x00"), "not a .json file that can be read"),
        (written("a.jsonl", b'{"tokens": [1], "reward": 1}\n{]'), "not a .jsonl file that can be read: line 2"),
        (written("a.npz", b"nothing"), "not a .npz file that can be read"),
        (single.rename(tmp_path / "b.npz"), "not a .npz file that can be read: one array"),
        (pickled, "not a .npz file that can be read"),
        (written("empty.npz", b""), "not a .npz file that can be read"),
        (written("a.pt", b"nothing"), "not a .pt file that can be read"),
        (written("empty.pt", b""), "not a .pt file that can be read"),
        (code, "not a .pt file that can be read"),
    ]
    for path, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            rollouts.read(path)
        assert str(caught.value).startswith(str(path))
    assert "not a .json file that can be read" in _refusal(_run(tmp_path / "a.json", "--out", tmp_path / "t.png"))
    with pytest.raises(ValueError, match="Is a directory"):
        rollouts.read(_folder(tmp_path / "folder.json"))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
