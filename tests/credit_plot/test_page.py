"""credit_page: what is in the file, that nothing else is needed, and what a browser shows of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from credit_pages import content, unpacked
from torch import Tensor

import fastreward as fr
from fastreward.credit_plot.packing import packed_floats, packed_integers

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = {
    1: "</script><b>",
    2: "<!--",
    3: 'say "x"\n',
    4: "\u2028\U0001f642",
    5: "{{DATA}} \ud800",
    6: "&amp;'\\u003c",
    7: "",
}
TOKENS = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0], [6, 7, 0, 0]])
MASK = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])


def written(path: Path, *arguments: Any, **options: Any) -> str:
    fr.credit_page(path, *arguments, **options)
    return path.read_text(encoding="ascii")


@pytest.fixture
def page(tmp_path: Path) -> str:
    """Two schemes, log-probs and what a loss returns of each token, with texts that look like markup."""
    torch.manual_seed(0)
    old = -torch.rand(3, 4)
    logprobs = torch.where(MASK > 0, old + 0.3 * torch.randn(3, 4), float("nan"))
    advantages = torch.tensor([1.0, -1.0, 0.5])
    loss = fr.losses.ppo(0.1, 0.1)
    result = fr.policy_loss(logprobs, old, advantages, MASK, loss=loss, return_tokens=("ratio", "clip"))
    schemes = {"grpo": advantages, "<td>": torch.arange(12.0).view(3, 4) - 5}
    return written(
        tmp_path / "page.html", TOKENS, schemes, MASK, logprobs=logprobs, extra=result.tokens, text=HOSTILE,
        rewards=torch.tensor([1.0, 0.0, 0.25]), group_ids=["a", "a", "</script>"],
        tree=fr.PrefixTree(TOKENS, MASK, ["a", "a", "b"]), title="</title> & more",
    )  # fmt: skip


def test_numbers_come_back() -> None:
    big = np.finfo(np.float32).max
    special = [0.0, -0.0, 1.0, -3.0, np.inf, -np.inf, np.nan, 1e-40, big / 2, 65536.0]
    values = np.concatenate([np.array(special, np.float32), np.random.default_rng(0).normal(size=1000).astype("f4")])
    back = unpacked(packed_floats(values))
    assert np.array_equal(back[:7], values[:7], equal_nan=True)
    np.testing.assert_allclose(back, values, rtol=2**-16, atol=1e-42)
    integers = np.array([0, -1, 2**31 - 1, -(2**31), 300])
    assert unpacked(packed_integers(integers)).tolist() == integers.tolist()
    assert unpacked(packed_floats(np.zeros(0, np.float32))).tolist() == []


def test_everything_is_in_the_page(page: str) -> None:
    data = content(page)
    ids, texts = data["vocabulary"]["ids"], data["vocabulary"]["texts"]
    assert [ids[k] for k in data["tokens"]] == [1, 2, 3, 4, 1, 2, 5, 6, 7]
    assert texts == [HOSTILE[k] for k in ids]
    assert data["lengths"].tolist() == [4, 3, 2]
    assert data["counted"].tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 1]
    assert data["rewards"] == [1.0, 0.0, 0.25]
    assert data["groups"]["names"] == ["a", "</script>"]
    assert data["groups"]["of"].tolist() == [0, 0, 1]
    values = {x["name"]: x["numbers"].tolist() for x in data["values"]}
    assert {x["name"]: x["scale"] for x in data["values"]} == {
        "grpo": "diverging", "<td>": "diverging", "logprobs": "low", "ratio": "ratio", "clip": "codes",
    }  # fmt: skip
    nan = pytest.approx(np.nan, nan_ok=True)
    assert values["grpo"] == [nan, 1, 1, 1, nan, -1, -1, 0.5, 0.5]
    assert values["<td>"] == [nan, -4, -3, -2, nan, 0, 1, 3, 4]
    assert data["tree"]["parent"].tolist()[0] == -1
    assert data["tree"]["order"].tolist() == [0, 1, 2]
    assert data["clips"] == {"0": "none", "1": "low", "2": "high", "3": "dual"}


def test_the_page_needs_nothing_else(page: str) -> None:
    """No address, and nothing that would load one; texts stay inside of their strings."""
    for pattern in (r"https?:", r"//[a-z]", r"\bsrc=", r"\bhref=", r"url\(", r"@import", r"\bfetch\(", r"import\("):
        assert not re.search(pattern, re.sub(r"// .*", "", page)), pattern
    assert "default-src 'none'" in page
    assert page.count("</script") == page.count("<script") == 2
    assert "<!--" not in page
    assert "<title>&lt;/title&gt; &amp; more</title>" in page


@pytest.mark.parametrize("kind", ["lengths", "attention", "packed"])
def test_other_layouts_are_the_same_page(page: str, kind: str, tmp_path: Path) -> None:
    """Left padding, packed tokens, lengths instead of the mask's end."""
    lengths, options = torch.tensor([4, 3, 2]), dict[str, Any]()
    there = torch.arange(4) < lengths[:, None]
    scheme, tokens, mask = torch.arange(12.0).view(3, 4) - 5, TOKENS, MASK

    def moved(x: Tensor) -> Tensor:
        return torch.stack([row.roll(4 - int(n)) for row, n in zip(x, lengths, strict=True)])

    if kind == "lengths":
        options["lengths"] = lengths
    elif kind == "attention":
        scheme, tokens, mask = map(moved, (scheme, tokens, mask))
        options["attention_mask"] = moved(there)
    else:
        scheme, tokens, mask = (x[there] for x in (scheme, tokens, mask))
        options["cu_seqlens"] = torch.tensor([0, 4, 7, 9])
    data = content(written(tmp_path / "other.html", tokens.numpy(), {"<td>": scheme}, mask, **options))
    whole = content(page)
    for name in ("tokens", "lengths", "counted"):
        assert data[name].tolist() == whole[name].tolist()
    assert data["vocabulary"]["texts"] is None
    expected = next(x["numbers"] for x in whole["values"] if x["name"] == "<td>")
    assert np.array_equal(data["values"][0]["numbers"], expected, equal_nan=True)


def test_groups_of_any_kind(tmp_path: Path) -> None:
    for given in (["a", "b", "a"], fr.Groups(["a", "b", "a"]), np.array([7, -1, 7]), torch.tensor([7, -1, 7])):
        data = content(written(tmp_path / "groups.html", TOKENS, torch.ones(3), group_ids=given))
        assert data["groups"]["of"].tolist() == [0, 1, 0]
        assert data["groups"]["names"] in (["a", "b"], ["7", "-1"])


def test_a_quarter_of_a_million_tokens(tmp_path: Path) -> None:
    """Of the 30 MB for a million tokens a quarter: random numbers, which hardly compress, and a text for each id."""
    shape, generator = (64, 4096), torch.Generator().manual_seed(0)

    def numbers() -> Tensor:
        return torch.randn(shape, generator=generator)

    path = tmp_path / "large.html"
    fr.credit_page(
        path, torch.randint(0, 50_000, shape, generator=generator), {"grpo": numbers()[:, 0], "gigpo": numbers()},
        logprobs=-numbers().abs(), ratio=numbers().exp(), entropy=numbers().abs(), extra={"kl": numbers()},
        text=lambda ids: f" token{ids[0]}",
    )  # fmt: skip
    assert path.stat().st_size < 30e6 / 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ending": ({"path": "page.txt"}, "path: expected a file that ends in .html"),
    "folder": ({"path": "no/page.html"}, "path: there is no folder"),
    "tokens": ({"tokens": torch.ones(3)}, r"tokens: expected .*integer"),
    "flat": ({"tokens": torch.ones(3, dtype=torch.long)}, r"tokens: expected \[B, T\], or \[N\] with cu_seqlens"),
    "advantages": (
        {"advantages": {"a": torch.ones(2)}},
        r"advantages\['a'\]: expected shape \[3, 4\] \(one per token\) or \[3\] \(one per sequence\), got \[2\]",
    ),
    "one": ({"advantages": torch.ones(5)}, r"advantages: expected shape \[3, 4\]"),
    "ratio": ({"ratio": torch.ones(3, 5)}, r"ratio: expected shape \[3, 4\]"),
    "twice": ({"ratio": torch.ones(3), "extra": {"ratio": torch.ones(3)}}, "ratio: given twice, as ratio and as extra"),
    "rewards": ({"rewards": torch.ones(2)}, r"rewards: expected shape \[3\]"),
    "groups": ({"group_ids": ["a"]}, "group_ids: expected one for each of the 3 sequences, got 1"),
    "lengths": ({"lengths": torch.tensor([4, 5, 1])}, r"lengths: expected numbers in \[0, 4\]"),
    "both": ({"lengths": torch.ones(3), "attention_mask": MASK}, "lengths, attention_mask: expected at most one"),
    "text": ({"text": {1: "a"}}, "text: expected one for each token, got none for 0"),
    "tree": ({"tree": fr.PrefixTree(TOKENS[:2])}, r"tree: expected shape \[3\]"),
    "longer": ({"tree": fr.PrefixTree(TOKENS), "lengths": torch.tensor([4, 3, 4])}, "whose sequence 1 has 4 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    given, message = REFUSED[case]
    path = tmp_path / given.get("path", "page.html")
    with pytest.raises((TypeError, ValueError), match=message):
        fr.credit_page(**{"tokens": TOKENS, "advantages": torch.ones(3), **given, "path": path})
    assert not path.exists()


def shown(path: Path, place: str) -> str:
    """The DOM after the page's script has run."""
    assert BROWSER is not None
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom")
    command = [BROWSER, *flags, f"--user-data-dir={path.parent}/profile", f"{path.as_uri()}#{place}"]
    return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()


#: Keys, from a token of sequence 0: to its end, over sequence 1, back again, and the next colours. Then the mouse.
ACTIONS = """
<script>setTimeout(() => {
  for (const key of ["End", "n", "ArrowLeft", "ArrowLeft", "c"])
    $("text").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  document.body.dataset.selected = $("token").textContent;
  const { left, top } = $("lines").getBoundingClientRect();
  $("lines").dispatchEvent(new MouseEvent("mousemove", { clientX: left + 14, clientY: top + 33 }));
}, 500)</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    """A link leads to a token, keys lead on from there, the mouse shows another; what looks like markup is text."""
    path = tmp_path / "actions.html"
    path.write_text(page.replace("</body>", ACTIONS), encoding="ascii")
    dom = shown(path, "channel=grpo&sequence=0&token=1")
    assert 'data-selected="say &quot;x&quot;\u23cetoken 3 at position 2 of sequence 0"' in dom
    panel = re.search(r'<section id="token"[^>]*>(.*?)</section>', dom, re.DOTALL)
    assert panel is not None
    assert panel[1] == "<b>&lt;/script&gt;&lt;b&gt;</b><br>token 1 at position 0 of sequence 0<br>masked out"
    lines = re.findall(r'<tr class="(\w*)"><td><button>(.*?)</button></td><td class="number">(.*?)</td>', dom)
    assert [name for _, name, _ in lines] == ["grpo", "&lt;td&gt;", "logprobs", "ratio", "clip"]
    assert [name for chosen, name, _ in lines if chosen] == ["&lt;td&gt;"]
    assert not any(number for _, _, number in lines)  # of a masked token
    assert "3 sequences, 9 tokens" in dom
    assert "tree of group a: 2 sequences, 4 nodes" in dom


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_numbers_of_a_token(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="ascii")
    numbers = re.findall(r'<td class="number">(.*?)</td>', shown(path, "channel=clip&sequence=0&token=2"))
    values = {x["name"]: float(x["numbers"][2]) for x in content(page)["values"]}
    assert numbers[:2] == ["1", "-3"]
    assert [float(x) for x in numbers[2:4]] == pytest.approx([values["logprobs"], values["ratio"]], rel=1e-4)
    assert numbers[4] == fr.Clip(int(values["clip"])).name.lower()
