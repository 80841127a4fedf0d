"""The command line: `fastreward doctor`, `verify`, `bench`, `compare`, `recipes` and `plot`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

app = typer.Typer(
    help="Compiled kernels for RL training of language models: what is here, is it right, how fast is it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

plots = typer.Typer(help="Draw what rollouts look like.", no_args_is_help=True)
app.add_typer(plots, name="plot")

#: Public functions whose operation has a shorter name.
_SHORT = {"token_logprobs": "logprobs", "linear_token_logprobs": "linear_logprobs", "group_advantages": "group"}


def _show_version(wanted: bool) -> None:
    if wanted:
        import fastreward

        sys.stdout.write(f"fastreward {fastreward.__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


LossOption = Annotated[
    str | None,
    typer.Option(
        "--loss",
        help="A loss or divergence of your own instead of the operations: module:function or file.py:function.",
    ),
]
PeerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--peer", help="With --loss: a plain torch function of its arguments, named as the same; may be repeated."
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON to stdout instead of tables.")]


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Show what is on this machine and which backend serves which operation, or why not."""
    from fastreward import doctor as room

    facts = room.report()
    if as_json:
        _print_json(facts)
    else:
        room.show(_console(), facts)


@app.command()
def verify(
    operations: Annotated[list[str] | None, typer.Argument(help="Operations; all when none is named.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller inputs and fewer seeds.")] = False,
    backends: Annotated[list[str] | None, typer.Option("--backend", help="Only this backend; may be repeated.")] = None,
    loss: LossOption = None,
    peers: PeerOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Hold every operation on every backend here to the float64 reference, gradients too. Exit code 1 on failure.

    With --loss a loss or divergence of your own instead, and beside it functions of yours (--peer).
    """
    from fastreward._runtime.dispatch import OPERATIONS
    from fastreward.verify import run as room

    _check_own(loss, peers, {"operations": operations})
    names = [_operation(name, OPERATIONS) for name in operations or OPERATIONS]
    of_peers: list[room.Finding] = []
    try:
        if loss is None:
            jobs = room.plan(names, backends, quick)
        else:
            from fastreward.verify.own import problems as own

            jobs, of_peers = own.plan(loss, peers or (), backends, quick)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    with _progress() as progress:
        task = progress.add_task("verify", total=len(jobs.problems))
        findings = room.run(jobs, lambda text: progress.update(task, advance=1, description=text)) + of_peers
    if as_json:
        _print_json(room.as_dict(jobs, findings))
    else:
        room.show(_console(), jobs, findings)
    if not room.passed(jobs, findings):
        raise typer.Exit(1)


@app.command()
def bench(
    operations: Annotated[list[str] | None, typer.Argument(help="Operations; all when none is named.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Write a chart to this file (.png, .svg, .pdf).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few rounds, no memory measurement.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rows: Annotated[int | None, typer.Option(min=1, help="First dimension: rows, or sequences.")] = None,
    vocab: Annotated[int | None, typer.Option(min=2, help="Vocabulary, where there is one.")] = None,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="float32 or bfloat16; may be repeated.")] = None,
    cases: Annotated[list[str] | None, typer.Option("--case", help="Only this case; may be repeated.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget of one case's timed rounds (at least 3 run).")] = None,
    memory: Annotated[bool | None, typer.Option("--memory/--no-memory", help="Peak memory too.")] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Beside the peers, or fastreward alone.")] = True,
    loss: LossOption = None,
    own_peers: PeerOption = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="At growing sizes, B and then T; the chart is of time per token.")
    ] = False,
) -> None:
    """Time every operation beside its peers and the machine's limit. Nothing is timed before its results are equal.

    `bench busy`: two threads beside one on a busy machine. `bench small_calls`: what a call costs before its work.
    `bench ranks`: a vocabulary split over two processes. `bench --loss module:function`: one of your own.
    """
    from fastreward import bench as room
    from fastreward.bench import own, report
    from fastreward.bench.case import EquivalenceError
    from fastreward.bench.engine import Settings
    from fastreward.bench.run import Plan, results

    _check_own(loss, own_peers, {"operations": operations, "--case": cases, "--dtype": dtypes, "--sweep": sweep})
    names = tuple(_operation(name, (*room.OPERATIONS, *room.BESIDES)) for name in operations or room.OPERATIONS)
    _check_device(device)
    if device != "cpu" and set(names) & set(room.BESIDES):
        raise typer.BadParameter(f"--device {device}: {', '.join(room.BESIDES)} runs on the CPU")
    for dtype in dtypes or ():
        if dtype not in ("float32", "bfloat16", "float16"):
            raise typer.BadParameter(f"--dtype: expected float32, bfloat16 or float16, got {dtype!r}")
    _check_output("--json", json_path)
    _check_output("--plot", plot_path, picture=True)
    settings = Settings(seconds or 0.5, 3, 15) if quick else Settings(seconds or 20.0)
    if sweep and set(names) & {*room.BESIDES, "prefix_tree"}:
        raise typer.BadParameter(f"--sweep: {', '.join((*room.BESIDES, 'prefix_tree'))} have sizes of their own")
    wants_memory = not (quick or sweep) if memory is None else memory
    known = sorted({case for name in names for case in room.operation(name).CASES})
    for case in cases or ():
        if case not in known:
            raise typer.BadParameter(f"--case: expected one of {', '.join(known)}, got {case!r}")
    plan = Plan(
        names,
        device,
        quick,
        rows,
        vocab,
        tuple(dtypes or ()),
        tuple(cases or ()),
        wants_memory,
        settings,
        peers,
        sweep,
    )
    console, done = _console(), []
    key = "sweep" if sweep else "cases"
    facts: dict[str, Any] = {"machine": report.machine(device), key: []}
    if json_path is not None:  # now, and after every case: whoever stops the run keeps what it has measured
        _write_json(json_path, facts)
    try:
        with _progress() as progress:
            task = progress.add_task("bench", total=1 if loss else len(plan.jobs()))

            def step(text: str) -> None:
                progress.update(task, description=text)

            for result in results(plan, step) if loss is None else own.results(loss, own_peers or (), plan, step):
                progress.advance(task)
                done.append(result)
                facts[key].append(result.as_dict())
                if json_path is not None:
                    _write_json(json_path, facts)
                report.print_case(console, result)
    except EquivalenceError as error:
        console.print(f"[bold red]not equivalent:[/] {error}")
        raise typer.Exit(1) from error
    except own.Unusable as error:
        raise typer.BadParameter(str(error)) from error
    report.print_summary(console, done)
    if plot_path is not None:
        (report.plot_sweep if sweep else report.plot)(facts[key], plot_path)
    if any(reason.startswith("not equivalent") for result in done for reason in result.outcome.case.absent.values()):
        raise typer.Exit(1)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The rollout engine's: .safetensors, .npz, .pt or .jsonl.")],
    b: Annotated[Path, typer.Argument(help="The trainer's, which may be the same file.")],
    key_a: Annotated[str | None, typer.Option(help="The name of A's log-probs or logits in its file.")] = None,
    key_b: Annotated[str | None, typer.Option(help="The name of B's.")] = None,
    temperature_a: Annotated[float, typer.Option(help="A's logits are divided by it.")] = 1.0,
    temperature_b: Annotated[float, typer.Option(help="B's logits are divided by it.")] = 1.0,
    tolerance: Annotated[float, typer.Option(help="What the first differing token of a sequence exceeds.")] = 0.0,
    top: Annotated[int, typer.Option(help="How many of the largest logits are looked at.")] = 20,
    as_json: JsonFlag = False,
    per_token: Annotated[bool, typer.Option("--per-token", help="With --json: the numbers of every token.")] = False,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Write a picture to this file (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Tell how far a rollout engine's log-probs are from the trainer's, and which known fault explains it.

    A file has logprobs [B, T] of the chosen tokens, or top_logprobs and top_ids
    [B, T, k], or logits [B, T, V]; and if you like tokens, mask, lengths,
    cu_seqlens. In .jsonl each line is a sequence. The names that TRL and verl use
    are known. Exit code 1 where a fault is found.
    """
    from fastreward.compare import compare as room
    from fastreward.compare.report import show

    _check_output("--plot", plot_path, picture=True)
    if per_token and not as_json:
        raise typer.BadParameter("--per-token: goes with --json")
    try:
        with _progress() as progress:
            task = progress.add_task("tokens", total=None)
            result = room(
                a, b, key_a=key_a, key_b=key_b, temperature_a=temperature_a, temperature_b=temperature_b,
                tolerance=tolerance, top=top, step=lambda done, all_: progress.update(task, completed=done, total=all_),
            )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        _print_json(result.to_dict(per_token))
    else:
        show(_console(), result)
    if plot_path is not None:
        result.plot(plot_path)
    if result.faults:
        raise typer.Exit(1)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="A method to explain; all are listed when none is named.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of methods of docs/methods.md.")
    ] = False,
) -> None:
    """List the published methods with their sources, or explain one: formula, gradient, how sure, an example."""
    from fastreward.recipes._catalogue import show as room

    if name is not None and markdown:
        raise typer.BadParameter("--markdown: prints the whole table, and takes no name")
    if markdown:
        sys.stdout.write(room.markdown())
    elif name is None:
        room.show_all(_console())
    else:
        try:
            recipe = room.find(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        room.explain(_console(), recipe)


@plots.command("tree")
def plot_tree(
    file: Annotated[
        Path | None, typer.Argument(help="Rollouts (.json, .jsonl, .npz, .pt); a built-in example if none.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the picture goes: .png, .svg or .pdf.")] = Path("tree.png"),
    group: Annotated[str | None, typer.Option(help="Which group, as the file names it; the first by default.")] = None,
    op: Annotated[str, typer.Option(help="A node's value, of the rewards below it: mean, sum, max, ...")] = "mean",
    mode: Annotated[str, typer.Option(help="A node's advantage: td, sibling, root, ...")] = "td",
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with a tokenizer (transformers), to write text instead of ids.")
    ] = None,
    max_nodes: Annotated[int, typer.Option(min=1, help="The most nodes that are drawn.")] = 400,
) -> None:
    """Draw a group's prefix tree: values on the nodes, advantages on the edges.

    FILE is a list of records, or in .jsonl a record in each line:
    {"tokens": [1, 2], "reward": 0.5, "group": "a"}, and if you like "mask"
    (0 = no credit) and "texts" (strings), one entry for each token. Or a table:
    {"tokens": [[1, 2]], "rewards": [0.5], "group_ids": ["a"]}, and if you like
    "mask", "texts" and "lengths". "group" and "group_ids" may be left out.
    """
    from fastreward._arguments import check
    from fastreward._arguments.options import TREE_MODES, TREE_OPS
    from fastreward.prefix_tree import rollouts

    _check_output("--out", out, picture=True)
    try:
        check.choice("--op", op, TREE_OPS)
        check.choice("--mode", mode, TREE_MODES)
        table = rollouts.example() if file is None else rollouts.read(file)
        tree, drawn = rollouts.save(
            out,
            table,
            group=group,
            op=next(o for o in TREE_OPS if o == op),
            mode=next(m for m in TREE_MODES if m == mode),
            decode=table.decode if tokenizer is None else rollouts.decoder(tokenizer),
            max_nodes=max_nodes,
        )
    except (ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    console, names = _console(), table.group_names
    console.print(tree.statistics())
    which = "" if len(names) == 1 else f": group {names[drawn]} of {len(names)} groups"
    console.print(f"The picture is in {out}{which}", markup=False, highlight=False, soft_wrap=True)


@plots.command("credit")
def plot_credit(
    file: Annotated[
        Path | None, typer.Argument(help="Rollouts, as `plot tree` reads them; two built-in ones if none.")
    ] = None,
    outs: Annotated[
        list[Path] | None,
        typer.Option(
            "--out",
            help="A picture (.png, .svg, .pdf) or a page (.html); may be repeated. "
            "credit.png and credit.html by default.",
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--scheme", help="Only this one; may be repeated. All that can run on the rollouts by default."),
    ] = None,
    group: Annotated[str | None, typer.Option(help="Whose rollouts are in the picture; the first by default.")] = None,
    most: Annotated[int, typer.Option("--rollouts", min=1, help="The most rollouts in the picture.")] = 8,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with a tokenizer (transformers), to write text instead of ids.")
    ] = None,
    gallery: Annotated[
        Path | None, typer.Option(help="Write the gallery of all schemes, docs/credit.md and its picture, instead.")
    ] = None,
) -> None:
    """Draw the advantage of each token under several schemes: as a picture, and as a page to look through.

    Schemes are group_advantages and the recipes for advantages (`fastreward recipes`).
    FILE may have "logprobs", "old_logprobs", "ref_logprobs" and "entropy" besides what
    `plot tree` reads, a number for each token: more recipes can run, and the page shows them.
    The page is one file, which opens offline: tokens coloured by a scheme's advantages,
    their tree beside them, every number of the token under the mouse.
    """
    from fastreward.credit_plot import command
    from fastreward.credit_plot import gallery as gallery_room
    from fastreward.prefix_tree import rollouts

    chosen = outs or [Path("credit.png"), Path("credit.html")]
    try:
        if gallery is not None:
            if file is not None or outs or names or group is not None or tokenizer is not None:
                raise typer.BadParameter("--gallery: takes no rollouts and no other option")
            gallery_room.write(gallery)
            return
        command.check_outputs("--out", chosen)
        table = None if file is None else rollouts.read(file)
        decode = None if tokenizer is None else rollouts.decoder(tokenizer)
        drawn = command.save(chosen, table, names=names or (), group=group, most=most, decode=decode)
    except (ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    console = _console()
    for line in drawn.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the `fastreward` script."""
    app()


def _operation(name: str, known: tuple[str, ...]) -> str:
    """Operations are also known by their public function's name."""
    name = _SHORT.get(name, name)
    if name not in known:
        raise typer.BadParameter(f"unknown operation {name!r}; expected one of {', '.join(known)}")
    return name


def _check_own(loss: str | None, peers: list[str] | None, others: dict[str, object]) -> None:
    """Refuse what does not go with a loss of one's own, and peers without one."""
    if loss is None and peers:
        raise typer.BadParameter("--peer: goes with --loss")
    for name, given in others.items():
        if loss is not None and given:
            raise typer.BadParameter(f"--loss: does not go with {name}")


def _check_output(option: str, path: Path | None, *, picture: bool = False) -> None:
    """Refuse a file that can't be written before any work is done."""
    from fastreward._arguments import check

    try:
        if path is not None:
            check.output_file(option, path, picture=picture)
    except (ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


def _check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch sees no CUDA device here; try `fastreward doctor`")


def _console() -> Console:
    # A pipe or a log has no width: tables are not squeezed into 80 columns there.
    return Console(width=None if sys.stdout.isatty() else 160)


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _print_json(facts: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write a file at once: whenever the process is stopped, it has the new contents or the old ones."""
    half = path.with_name(f"{path.name}.part")
    half.write_text(json.dumps(facts, indent=1) + "\n")
    half.replace(path)


if __name__ == "__main__":
    main()
