"""Choosing a backend: by device, by hand, by environment; a choice that cannot serve says why."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastreward as fr
from fastreward._runtime import dispatch

LOGITS, LABELS = torch.randn(2, 9), torch.tensor([1, 2])


def test_cpu_tensors_go_to_cpu() -> None:
    assert dispatch.select("logprobs", LOGITS) == "cpu"


def test_by_hand_and_nested() -> None:
    with fr.backend("reference"):
        assert dispatch.select("logprobs", LOGITS) == "reference"
        with fr.backend("cpu"):
            assert dispatch.select("logprobs", LOGITS) == "cpu"
        assert dispatch.select("logprobs", LOGITS) == "reference"
    assert dispatch.select("logprobs", LOGITS) == "cpu"


def test_threads_do_not_take_each_others_choice() -> None:
    """A enters, B enters, A leaves: B goes on with its own, and so does A while B is inside."""
    steps = [threading.Event() for _ in range(4)]
    seen: dict[str, str] = {}

    def first() -> None:
        with fr.backend("reference"):
            steps[0].set()
            steps[1].wait(10)
            seen["first, second inside"] = dispatch.select("logprobs", LOGITS)
        steps[2].set()
        seen["first, outside"] = dispatch.select("logprobs", LOGITS)
        steps[3].set()

    def second() -> None:
        steps[0].wait(10)
        with fr.backend("cpu"):
            steps[1].set()
            steps[2].wait(10)
            seen["second, first gone"] = dispatch.select("logprobs", LOGITS)
            steps[3].wait(10)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first, second inside": "reference", "second, first gone": "cpu", "first, outside": "cpu"}
    assert not dispatch._chosen_by_hand


def test_a_thread_without_a_choice_follows_the_last_one() -> None:
    seen = []
    with fr.backend("reference"):
        worker = threading.Thread(target=lambda: seen.append(dispatch.select("logprobs", LOGITS)))
        worker.start()
        worker.join()
    assert seen == ["reference"]


@pytest.mark.slow
def test_chosen_inside_and_around_compiled_functions() -> None:
    """Another choice is another graph, the same one none; blocks inside a compiled function leave nothing behind."""
    graphs = 0

    def counting(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    @torch.compile(backend=counting, fullgraph=True)
    def score(logits: torch.Tensor) -> torch.Tensor:
        return fr.token_logprobs(logits, LABELS).logprobs

    @torch.compile(backend=counting, fullgraph=True)
    def twice(logits: torch.Tensor) -> torch.Tensor:
        with fr.backend("reference"):
            first = fr.token_logprobs(logits, LABELS).logprobs
            with fr.backend("cpu"):
                return first - fr.token_logprobs(logits, LABELS).logprobs

    def chosen() -> None:
        with fr.backend("reference"):
            score(LOGITS)

    score(LOGITS)
    for _ in range(2):
        chosen()
    thread = threading.Thread(target=chosen)
    thread.start()
    thread.join()
    assert graphs == 2
    assert twice(LOGITS).abs().max() < 1e-6
    assert twice(LOGITS).abs().max() < 1e-6
    assert graphs == 3
    assert not dispatch._chosen_by_hand


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREWARD_BACKEND", "reference")
    assert dispatch.select("group", LOGITS) == "reference"
    monkeypatch.setenv("FASTREWARD_BACKEND", "fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'; expected one of reference, cpu, triton, cuda"):
        fr.token_logprobs(LOGITS, LABELS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("triton", r"TRITON_INTERPRET=1|triton is not installed"), ("cuda", r"its kernels take CUDA tensors")],
)
def test_a_choice_that_cannot_serve_says_why(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with fr.backend(name), pytest.raises(fr.BackendError, match=reason):
        fr.token_logprobs(LOGITS, LABELS)


def test_cuda_tensors_without_cuda_say_why() -> None:
    """A CUDA tensor cannot exist here, so the dispatcher is asked as it would be for one."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert dispatch.unavailable("logprobs", "cpu", "cuda") == "its kernels take CPU tensors"
    assert "CUDA" in (dispatch.unavailable("logprobs", "cuda", "cuda") or "")


def test_a_cuda_tensor_that_nothing_can_serve_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is missing and no CUDA kernels are built: a stand-in for a tensor, as there is no device to put one on."""

    class OnDevice:
        device, is_cpu = torch.device("cuda", 0), False

    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dispatch, "CUDA_PASSED_ON", {})
    dispatch.unavailable.cache_clear()
    try:
        message = r"backend 'triton' cannot serve logprobs on cuda:0: triton is not installed"
        with pytest.raises(fr.BackendError, match=message):
            dispatch.select("logprobs", OnDevice())
        with (
            fr.backend("cpu"),
            pytest.raises(fr.BackendError, match=r"'cpu' cannot serve group on cuda:0: its kernels take CPU tensors"),
        ):
            dispatch.select("group", OnDevice())
    finally:
        dispatch.unavailable.cache_clear()


def test_cuda_says_that_it_builds_no_trees_and_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        device, is_cpu = torch.device("cuda", 0), False

    with (
        fr.backend("cuda"),
        pytest.raises(fr.BackendError, match=r"'cuda' .* no CUDA C\+\+ .* trees, Triton's do; build"),
    ):
        dispatch.select("prefix_tree_build", OnDevice())
    monkeypatch.setattr(dispatch, "unavailable", lambda *_: None)
    assert dispatch.select("prefix_tree_build", OnDevice()) == "triton"
    assert dispatch.select("prefix_tree", OnDevice(), "triton") == "triton"
    with fr.backend("cuda"):
        assert dispatch.select("prefix_tree", OnDevice(), "triton") == "cuda"
    monkeypatch.setattr(dispatch, "CUDA_PASSED_ON", {"prefix_tree": "a GPU"})
    assert dispatch.select("prefix_tree", OnDevice(), "triton") == "cuda"


def test_a_tree_is_served_by_its_maker_or_by_hand() -> None:
    """And never in silence by another than the choice."""
    tokens, values = torch.tensor([[1, 2], [1, 3]]), torch.ones(2)
    with fr.backend("reference"):
        tree = fr.PrefixTree(tokens)
    assert tree.forest.backend == tree.forest.builder == "reference"
    with fr.backend("cpu"):
        assert tree.forest.backend == tree.forest.builder == "cpu"
    with fr.backend("cuda"), pytest.raises(fr.BackendError, match="its kernels take CUDA tensors"):
        tree.aggregate(values)


def test_experimental_cuda_kernels_are_never_the_default() -> None:
    for operation in dispatch.OPERATIONS:
        if operation not in dispatch.CUDA_PASSED_ON:
            assert dispatch._default(operation, "cuda") == "triton"


def test_import_is_light() -> None:
    """`import fastreward` costs less than a tenth of what torch does, and pulls in no CLI, Triton or trainer.

    (Here 0.05 s beside 1 s; a share, as both are slower on a busy machine. Without garbage collection: a round over all
    of torch's objects takes 0.1 s, and in whose import it falls hangs on a few objects.)
    """
    code = (
        "import gc, time, sys; gc.disable(); start = time.process_time(); import torch; before = set(sys.modules); "
        "middle = time.process_time(); import fastreward; "
        "print((time.process_time() - middle) / (middle - start)); "
        "print([m for m in ('rich', 'typer', 'triton', 'trl', 'matplotlib') if m in set(sys.modules) - before])"
    )
    assert min(_run(code) for _ in range(3)) < 0.1


def _run(code: str) -> float:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # compiled once, as where people import it
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    lines = done.stdout.split("\n")
    assert lines[1] == "[]"
    return float(lines[0])


@pytest.mark.parametrize(
    ("module", "written", "near"),
    [
        ("fastreward", "tokens_logprobs", r"did you mean fastreward\.token_logprobs, "),
        ("fastreward", "gspo", r"did you mean fastreward\.losses\.gspo\?$"),
        ("fastreward", "qqqqqq", r"'qqqqqq'$"),
        ("fastreward.losses", "gpso", r"did you mean .*gspo.*\?"),
        ("fastreward.losses", "qqqqqq", "; `fastreward recipes` lists"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(module: str, written: str, near: str) -> None:
    with pytest.raises(AttributeError, match=rf"^module '{module}' has no attribute (?=.*'{written}').*{near}"):
        getattr(importlib.import_module(module), written)


def test_the_package_lists_what_it_has() -> None:
    code = (
        "import sys, fastreward; names = dir(fastreward); "
        "assert {'PrefixTree', 'recipes', 'patch', *fastreward.__all__} <= set(names); "
        "assert not {'fastreward.recipes', 'fastreward.patch', 'fastreward.prefix_tree'} & set(sys.modules); "
        "fastreward.patch.undo(); assert all(hasattr(fastreward, name) for name in names)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
