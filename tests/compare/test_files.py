"""compare: the same from every kind of file, and what it says of files that it can't read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastreward as fr

GENERATOR = torch.Generator().manual_seed(0)
A, B_SIDE = (torch.randn(3, 6, 9, generator=GENERATOR) for _ in range(2))
TOKENS = torch.randint(0, 9, (3, 6), generator=GENERATOR)
MASK = torch.arange(6) < torch.tensor([[6], [2], [4]])


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    pytest.importorskip("safetensors.torch").save_file(tensors, path, metadata)


def content(z: Tensor, kind: str) -> dict[str, Tensor]:
    logprobs = z.log_softmax(-1)
    values = {
        "logprobs": lambda: {"logprobs": logprobs.gather(-1, TOKENS.unsqueeze(-1)).squeeze(-1)},
        "top-k": lambda: dict(zip(("top_logprobs", "top_ids"), (x.clone() for x in logprobs.topk(4, -1)), strict=True)),
        "logits": lambda: {"logits": z},
    }[kind]()
    return {**values, "tokens": TOKENS, "mask": MASK}


def _jsonl(path: Path, tensors: dict[str, Tensor]) -> None:
    with path.open("w") as file:
        for row, length in enumerate(MASK.sum(-1).tolist()):
            file.write(json.dumps({k: x[row, :length].tolist() for k, x in tensors.items()}) + "\n")


WRITERS: dict[str, Any] = {
    ".safetensors": lambda path, x: save_file(x, path, {"format": "pt"}),
    ".npz": lambda path, x: np.savez(path, **{k: v.numpy() for k, v in x.items()}),
    ".pt": lambda path, x: torch.save(x, path),
    ".jsonl": _jsonl,
}


@pytest.mark.parametrize("kind", ["logprobs", "top-k", "logits"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format(tmp_path: Path, suffix: str, kind: str) -> None:
    a, b = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    WRITERS[suffix](a, content(A, kind))
    WRITERS[suffix](b, content(B_SIDE, kind))
    want = fr.compare(content(A, kind), content(B_SIDE, kind))
    found = fr.compare(a, str(b))
    assert found.kind == kind
    assert found.totals == pytest.approx(want.totals, rel=1e-6, abs=1e-9)
    assert found.first_difference.tolist() == want.first_difference.tolist()
    assert fr.compare(a, content(B_SIDE, kind)).totals == pytest.approx(want.totals, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_dtypes_of_files(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    WRITERS[suffix](tmp_path / f"a{suffix}", {"logits": A.to(dtype), "mask": MASK.to(torch.uint8)})
    want = fr.compare(A.to(dtype), B_SIDE, mask=MASK)
    assert fr.compare(tmp_path / f"a{suffix}", B_SIDE).totals == want.totals


def test_one_file_for_both_sides_by_the_trainers_names(tmp_path: Path) -> None:
    rollout, old = (content(z, "logprobs")["logprobs"] for z in (A, B_SIDE))
    want = fr.compare(rollout, old, mask=MASK).totals
    for names in (
        ("rollout_log_probs", "old_log_probs", "response_mask"),
        ("sampling_per_token_logps", "old_per_token_logps", "completion_mask"),
    ):
        torch.save(dict(zip(names, (rollout, old, MASK), strict=True)) | {"rewards": torch.zeros(3)}, tmp_path / "x.pt")
        assert fr.compare(tmp_path / "x.pt", tmp_path / "x.pt").totals == want
    np.savez(tmp_path / "x.npz", engine=rollout.numpy(), ours=old.numpy(), mask=MASK.numpy())
    assert fr.compare(tmp_path / "x.npz", tmp_path / "x.npz", key_a="engine", key_b="ours").totals == want
    torch.save(rollout, tmp_path / "a.pt")
    assert fr.compare(tmp_path / "a.pt", old, mask=MASK).totals == want


def test_top_logprobs_as_vllm_writes_them(tmp_path: Path) -> None:
    sides = {name: content(z, "top-k") for name, z in (("a", A), ("b", B_SIDE))}
    for name, side in sides.items():
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for row, length in enumerate(MASK.sum(-1).tolist()):
                pairs = [
                    zip(side["top_ids"][row, t].tolist(), side["top_logprobs"][row, t].tolist(), strict=True)
                    for t in range(length)
                ]
                value = (lambda x: {"logprob": x, "rank": 1}) if name == "a" else (lambda x: x)
                top = [{str(k): value(x) for k, x in reversed(list(p))} for p in pairs]
                file.write(json.dumps({"top_logprobs": top, "prompt": "?"}) + "\n\n")
    want = fr.compare(*({k: v for k, v in x.items() if k != "tokens"} for x in sides.values()))
    assert fr.compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl").totals == pytest.approx(want.totals, rel=1e-6)


def test_shorter_lists_of_top_logprobs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"top_logprobs": [{"3": -0.1}, {"1": -0.5, "2": -1.0}]}) + "\n")
    found = fr.compare(tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    assert found.verdict == "no fault found: both sides are the same to the last bit"
    assert found.totals["overlap"] == 1.0
    assert found.per_token["tv_at_most"].tolist() == pytest.approx(
        [1 - np.exp(-0.1), 1 - np.exp(-0.5) - np.exp(-1.0)], abs=2e-6
    )


def test_files_are_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"logits": A.masked_fill(A > 2, -torch.inf)}, path)
    before = path.read_bytes()
    fr.compare(path, A, temperature_a=0.5)
    assert path.read_bytes() == before


def test_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    save_file({"logprobs": torch.zeros(0, 4)}, tmp_path / "a.safetensors")
    assert fr.compare(tmp_path / "a.safetensors", tmp_path / "a.safetensors").tokens == 0
    with pytest.raises(ValueError, match=r"a.jsonl: .*no line has anything in it"):
        fr.compare(tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"logprobs": []}\n{"logprobs": [-1.0]}\n')
    assert fr.compare(tmp_path / "b.jsonl", tmp_path / "b.jsonl").first_difference.tolist() == [-1, -1]


def _header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"", "expected a file that ends in .safetensors, .npz, .pt, .jsonl, got '.csv'"),
        ("a", b"", "got 'no ending'"),
        ("a.safetensors", b"", "not a .safetensors file that can be read: its header should have 0 bytes"),
        ("a.safetensors", struct.pack("<Q", 99) + b"{}", "its header should have 99 bytes, the file has 10"),
        ("a.safetensors", _header(b"{no}"), "not a .safetensors file that can be read: "),
        (
            "a.safetensors",
            _header(b'{"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}', b"1234"),
            "x should lie in the bytes 0 to 16, which does not fit",
        ),
        (
            "a.safetensors",
            _header(b'{"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}', b"1"),
            "x has the dtype F8_E4M3; expected one of F64",
        ),
        ("a.npz", b"no archive", "not a .npz file that can be read"),
        ("a.pt", b"no archive", "not a .pt file that can be read"),
        ("a.jsonl", b'{"logprobs": [-1]}\n{', "line 2: "),
        ("a.jsonl", b"[1]\n", "line 1: expected a dictionary with logprobs, .*got list"),
        ("a.jsonl", b'{"x": 1}\n', "line 1: expected one of the keys logprobs, .*got x"),
        ("a.jsonl", b'{"logprobs": -1}\n', "line 1: logprobs: expected a list, got float|line 1: logprobs: .*got int"),
        ("a.jsonl", b'{"logprobs": ["-1"]}\n', "line 1: logprobs: expected numbers, got '-1'"),
        ("a.jsonl", b'{"logprobs": [-1, null]}\n', "logprobs: expected log-probs.*got nan in sequence 0, token 1"),
        ("a.jsonl", b'{"logprobs": [-1, -2], "tokens": [1]}\n', "line 1: tokens has 1 entries, logprobs has 2"),
        ("a.jsonl", b'{"logprobs": [-1]}\n{"tokens": [1]}\n', "line 2: has tokens, line 1 has logprobs"),
        ("a.jsonl", b'{"top_logprobs": [[-1]]}\n', "A: expected top_logprobs and top_ids together"),
        ("a.jsonl", b'{"top_logprobs": [-1], "top_ids": [1]}\n', "line 1: top_logprobs: expected a list of lists"),
        ("a.jsonl", b'{"top_logprobs": [{"1": -1}, 3]}\n', "top_logprobs: expected a dictionary for each token"),
        (
            "a.jsonl",
            b'{"top_logprobs": [{"the": -1}]}\n',
            "line 1: top_logprobs: expected ids of the vocabulary, got 'the'",
        ),
        (
            "a.jsonl",
            b'{"top_logprobs": [[{"token": "a"}]]}\n',
            "line 1: top_logprobs: expected numbers, got {'token': 'a'}",
        ),
        ("missing/a.pt", None, "No such file"),
    ],
)
def test_refusals(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        fr.compare(path, torch.zeros(1, 2))


def test_a_pickle_with_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"logprobs": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"not a \.pt file that can be read"):
        fr.compare(tmp_path / "a.pt", torch.zeros(1, 2))


def test_a_completion_as_vllm_has_it(tmp_path: Path) -> None:
    """token_ids, and logprobs that are dictionaries; None where nothing is known, and a byte order mark."""
    known = {"5": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}, "7": {"logprob": -1.5}}
    line = json.dumps({"token_ids": [6, 5, 7], "logprobs": [None, known, known], "text": "aab"})
    (tmp_path / "a.jsonl").write_text("\ufeff" + line)
    result = fr.compare(tmp_path / "a.jsonl", torch.tensor([[-9.0, -0.5, -1.0]]))
    torch.testing.assert_close(
        result.per_token["difference"], torch.tensor([torch.nan, 0.0, 0.5]).double(), equal_nan=True
    )


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (
            {"logprobs": -torch.ones(1, 2), "lengths": torch.tensor([3])},
            r"A: lengths: expected 0 to 2, the width, got \[3\]",
        ),
        (-torch.ones(1, 2, 1), r"A: logits: expected a vocabulary, got shape \[1, 2, 1\]; log-probs of tokens are"),
    ],
)
def test_sides_that_can_not_be(side: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fr.compare(side, {"logprobs": -torch.ones(1, 2), "tokens": torch.zeros(1, 2, dtype=torch.int64)})
