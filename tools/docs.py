"""Write the generated parts of README.md and docs/: `python tools/docs.py`; with `--check` only say what is stale.

A generated part stands between `<!-- NAME -->` and `<!-- /NAME -->`, on lines of its own or inside of one; everything
around it is written by hand. Methods, how many there are, and metrics come from the package, figures from
bench/results/*.json, what machine code predicts from docs/gpu.json.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import machine_code

from fastreward import bench, losses, recipes
from fastreward._loss_call.results import Metrics
from fastreward.recipes._catalogue import show
from fastreward.recipes._catalogue.registry import FAMILIES, VERIFIED

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
COMMAND = "python tools/docs.py"
OURS = "fastreward"

#: The README's figures: (what, operation, case, dtype) of the newest run that has them; what none has is left out.
FIGURES: Final = (
    ("log-probs of 2048 x 151,936 logits", "logprobs", "forward", "float32"),
    ("log-probs, forward + backward in place", "logprobs", "backward-inplace", "float32"),
    ("log-probs from hidden states, forward + backward", "linear_logprobs", "backward", "float32"),
    ("KL of student and teacher, 512 x 151,936 logits", "divergence", "reverse-kl", "float32"),
    ("Jensen-Shannon from hidden states, forward + backward", "linear_divergence", "jsd+gradient", "float32"),
    ("logits to PPO loss and gradient", "logits_policy_loss", "fresh", "float32"),
    ("PPO loss of 4M tokens, forward + backward", "policy_loss", "ppo", "float32"),
    ("GAE of 34M tokens, into given memory", "returns", "gae-out", "float32"),
    ("scores and KL to rewards of 34M tokens", "rewards", "k1-out", "float32"),
    ("value loss of 4M tokens, forward + backward", "value_loss", "clipped", "float32"),
    ("advantages of the turns of 4M tokens", "segments", "turn-advantage", "float32"),
    ("advantages of 65,536 rewards by uid", "group", "uid-strings-16x", "float32"),
    ("prefix tree of 3.1M tokens", "prefix_tree", "build-g8-30", "int64"),
    ("training step on packed trees, 70 % shared", "prefix_tree", "train-g8-70", "float32"),
)
_PEERS: Final = ("torch eager", "torch.compile", "TRL", "verl")


# ------------------------------------------------------------------------------------------------------------ methods
def losses_table() -> str:
    """Every loss of the package: its call, formula and what is known of its source through the recipes made of it."""
    lines = []
    for pairs, operation in ((False, "policy_loss"), (True, "preference_loss")):
        rows = []
        for name in sorted(losses.__all__):
            loss = getattr(losses, name)
            if isinstance(loss, losses.Definition) and loss.pairs == pairs:
                rows.append((f"`{_call(loss)}`", _formula(loss), *_sources(loss)))
        title = f"over log-probs, for `{operation}`" if not pairs else f"over pairs, for `{operation}`"
        lines += [f"**Losses {title}**", "", *_table(("loss", "formula", "recipes", "paper", "verified"), rows), ""]
    return "\n".join(lines[:-1])


def _call(loss: Any) -> str:
    shown, named = [], False
    for p in inspect.signature(loss).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not named:
            shown.append("*")
            named = True
        shown.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    return f"{loss.name}({', '.join(shown)})"


def _formula(loss: Any) -> str:
    """The first paragraph of its description."""
    return _cell(" ".join((inspect.getdoc(loss) or "").partition("\n\n")[0].split()))


def _sources(loss: Any) -> tuple[str, str, str]:
    made = [recipe for recipe in recipes.RECIPES.values() if recipe.definition is loss]
    names = ", ".join(f"`{recipe.name}`" for recipe in made)
    if not made:
        return "", "", ""
    best = next((recipe for recipe in made if recipe.name == loss.name), made[0])
    paper = best.source if best.url is None else f"[{best.source.removeprefix('arXiv ')}]({best.url})"
    return names, paper, VERIFIED[best.verified][0]


def count_losses() -> str:
    """How many losses there are, over log-probs and over pairs."""
    return str(sum(isinstance(x, losses.Definition) for x in vars(losses).values()))


def count_recipes(*families: str) -> str:
    """How many recipes there are; of these families alone where some are named."""
    return str(sum(not families or r.family in families for r in recipes.RECIPES.values()))


def count_credit() -> str:
    """How many recipes make rewards, advantages and the like, rather than a loss or what a loss takes."""
    of_losses = ("token", "sequence", "preference", "correction", "divergence")
    return count_recipes(*(set(FAMILIES) - set(of_losses)))


def metrics() -> str:
    """The docstring of Metrics as paragraphs and tables."""
    text = re.sub(r"\n {5,}", " ", inspect.getdoc(Metrics) or "")  # lines that continue an entry
    parts: list[str] = []
    for indented, group in groupby(text.splitlines(), lambda line: line.startswith("    ")):
        if not indented:
            parts += ["\n".join(group).strip()]
            continue
        entries = [line.strip().split(": ", 1) for line in group]
        rows = [(", ".join(f"`{name}`" for name in names.split(", ")), _cell(what)) for names, what in entries]
        parts += ["\n".join(_table(("metric", "what it is"), rows))]
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------------------ figures
def runs() -> str:
    """Every run of `fastreward bench` in bench/results, the newest first."""
    return "\n\n".join(_run(path, run) for path, run in reversed(list(_runs())))


def figures() -> str:
    """The README's short table."""
    found = {
        (case["operation"], case["case"], case["dtype"]): case
        for _, run in _runs()
        for case in reversed(run["cases"])  # of several sizes the first
    }
    rows = []
    for what, operation, name, dtype in FIGURES:
        if (case := found.get((operation, name, dtype))) is None:
            continue
        times = {contender["name"]: contender["fastreward_speedup"] for contender in case["contenders"]}
        others = [f"{name} {_ratio(times[name])}" for name in times if name not in (OURS, *_PEERS) and _foreign(name)]
        rows.append(
            (
                what,
                _time(_ours(case)["median_ms"]),
                _share(case),
                *(_ratio(times[peer]) if peer in times else "" for peer in _PEERS[1:]),
                f"torch eager {_ratio(times[_PEERS[0]])}" if not others and _PEERS[0] in times else ", ".join(others),
                f"`{operation} --case {name}{_dtype(operation, dtype)}`",
            )
        )
    return "\n".join(_table(("two threads", OURS, "of limit", *_PEERS[1:], "others", "command"), rows))


def _runs() -> Iterable[tuple[Path, dict[str, Any]]]:
    """(file, contents) of what `fastreward bench --json` wrote, by date."""
    for path in sorted(RESULTS.glob("*.json")):
        run = json.loads(path.read_text())
        if "cases" in run:
            yield path, run


def _run(path: Path, run: dict[str, Any]) -> str:
    machine = run["machine"]
    device = machine.get("gpu", f"{machine['cpu']}, {machine['isa'].partition(' ')[0]}, {machine['threads']} threads")
    lines = [f"### {machine['date']}: {_title(path)}", ""]
    lines += [f"{device}; torch {machine['torch']}, Python {machine['python']}; commit {machine['commit']};"]
    lines += [f"[every figure](../bench/results/{path.name})."]
    seen: set[tuple[str, ...]] = set()
    parts: dict[str, list[dict[str, Any]]] = {}
    for case in run["cases"]:
        key = (case["operation"], case["case"], case["dtype"])
        again = f" --rows {case['shape'][0]}" if key in seen else ""
        seen.add(key)
        parts.setdefault(f"fastreward bench {case['operation']}{again}", []).append(case)
    for command, cases in parts.items():
        lines += ["", f"`{command}`", "", *(_busy(cases) if cases[0]["operation"] == "busy" else _cases(cases))]
    return "\n".join(lines)


def _title(path: Path) -> str:
    return path.stem[len("2026-11-21-") :].replace("-", " ")


def _cases(cases: list[dict[str, Any]]) -> list[str]:
    peers = list(dict.fromkeys(c["name"] for case in cases for c in case["contenders"] if c["name"] != OURS))
    rows = []
    for case in cases:
        by_name = {contender["name"]: contender for contender in case["contenders"]}
        ours = by_name[OURS]
        rows.append(
            (
                f"`{case['case']}`",
                f"{case['dtype']} {case['shape']}",
                f"{_time(ours['median_ms'])}{_memory(ours)}",
                _share(case),
                *(
                    f"{_ratio(by_name[peer]['fastreward_speedup'])}{_memory(by_name[peer])}" if peer in by_name else ""
                    for peer in peers
                ),
                _time(ours["first_ms"]),
                "<br>".join(_promise(promise) for promise in case["targets"] if promise["met"] is not None),
            )
        )
    return _table(("case", "on", OURS, "of limit", *peers, "first call", "promises"), rows)


def _busy(cases: list[dict[str, Any]]) -> list[str]:
    """A row for each call, a column for each number of busy processes: median and 99th percentile of two threads."""
    calls: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        call, processes, _ = case["case"].rsplit("-", 2)
        calls.setdefault(call, {})[processes] = {contender["name"]: contender for contender in case["contenders"]}
    counts = list(next(iter(calls.values())))
    rows = []
    for call, loads in calls.items():
        texts = []
        for processes in counts:
            two, one = loads[processes][OURS], loads[processes][f"{OURS}, one thread"]
            ratio = two["median_ms"] / one["median_ms"]
            texts.append(f"{_time(two['median_ms'])} ({_time(two['p99_ms'])}), {_ratio(ratio)} of one thread's time")
        rows.append((f"`{call}`", *texts))
    return _table(("two threads: median (p99)", *(f"{count} busy processes" for count in counts)), rows)


def _dtype(operation: str, dtype: str) -> str:
    """The option, where an operation is measured in several."""
    return f" --dtype {dtype}" if len(bench.operation(operation).DTYPES) > 1 else ""


def _ours(case: dict[str, Any]) -> dict[str, Any]:
    return next(contender for contender in case["contenders"] if contender["name"] == OURS)


def _foreign(name: str) -> bool:
    """Whether a contender is a peer, and not fastreward in another form or a variant of one that has a column."""
    return not name.startswith((OURS, *(f"{peer} " for peer in _PEERS)))


def _share(case: dict[str, Any]) -> str:
    share = _ours(case)["share_of_limit"]
    return f"{share:.0%}".replace("%", " %") if share >= 0.005 else ""


def _promise(promise: dict[str, Any]) -> str:
    return f"{'met' if promise['met'] else '**missed**'}: {promise['text']}: {promise['measured']}"


def _time(ms: float) -> str:
    return f"{ms / 1e3:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.2g}x" if ratio >= 10 else f"{ratio:.2f}x"


def _memory(contender: dict[str, Any]) -> str:
    peak = contender["peak_extra_bytes"]
    return "" if peak is None else f", {peak / 2**20:.0f} MiB"


# ----------------------------------------------------------------------------------------------------------- the files
#: file -> its generated parts.
PARTS: Final[dict[str, dict[str, Callable[[], str]]]] = {
    "README.md": {"figures": figures, "credit": count_credit},
    "docs/methods.md": {
        "count of recipes": count_recipes,
        "count of losses": count_losses,
        "recipes": lambda: show.markdown().rstrip(),
        "losses": losses_table,
    },
    "docs/losses.md": {"metrics": metrics},
    "docs/benchmarks.md": {"runs": runs},
    "docs/gpu.md": {"gpus": machine_code.gpus, "kernels": machine_code.kernels, "cuda": machine_code.cuda},
}


def written(name: str) -> str:
    """The file as it should be."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for part, make in PARTS[name].items():
        start, end = f"<!-- {part} -->", f"<!-- /{part} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"{name}: expected one {start} and one {end}")
        before, _, rest = text.partition(start)
        made = f"\n{make()}\n" if rest.startswith("\n") else make()
        text = f"{before}{start}{made}{end}{rest.partition(end)[2]}"
    return text


def stale() -> list[str]:
    """The files whose generated parts are not what the command would write."""
    return [name for name in PARTS if (ROOT / name).read_text(encoding="utf-8") != written(name)]


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return [re.sub(r" +(?=\|)", " ", f"| {' | '.join(line)} |") for line in lines]


def main(arguments: list[str]) -> int:
    """0 where nothing was stale, or everything has been written."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"usage: {COMMAND} [--check]\n")
        return 2
    names = stale()
    for name in names:
        if not arguments:
            (ROOT / name).write_text(written(name), encoding="utf-8")
        sys.stdout.write(f"{name}: {'stale' if arguments else 'written'}\n")
    return 1 if arguments and names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
