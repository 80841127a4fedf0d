"""The patch for verl: where its bindings go and that they come back, what it leaves alone, and verl's entry point."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

from fastreward import patch
from fastreward.patch import imports
from fastreward.patch.verl import apply, sources, tables
from fastreward.patch.verl.replacement import Registration, Replacement

pytest.importorskip("verl")
core = importlib.import_module("verl.trainer.ppo.core_algos")
functional = importlib.import_module("verl.utils.torch_functional")

#: A module that imports several of the functions by name; not imported by the others.
LATE = "verl.workers.utils.losses"


@pytest.fixture(autouse=True)
def _taken_out() -> Iterator[None]:
    patch.undo()
    yield
    patch.undo()


def bound() -> dict[tuple[str, str, Any], int]:
    """What every name and registry entry of verl's modules holds, by identity."""
    found = {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or name.split(".")[0] != "verl":
            continue
        for key, value in vars(module).items():
            found[name, key, None] = id(value)
            if isinstance(value, dict) and not key.startswith("__"):
                found |= {(name, key, entry): id(x) for entry, x in value.items()}
    return found


def test_undo_restores_every_binding_in_every_module() -> None:
    before = bound()
    report = patch.verl()
    during = bound()
    changed = {place for place, value in during.items() if before.get(place) != value}
    assert changed
    assert report.replaced
    patch.undo()
    assert bound() == before
    assert patch.status() == {}


def test_every_name_that_a_module_imported_is_exchanged() -> None:
    late = types.ModuleType("verl.of_a_test")
    late.taken = functional.masked_whiten  # type: ignore[attr-defined]
    late.REGISTRY = {"mine": functional.masked_whiten, "other": print}  # type: ignore[attr-defined]
    stock = functional.masked_whiten
    sys.modules[late.__name__] = late
    try:
        patch.verl()
        ours = functional.masked_whiten
        assert ours is not stock
        assert late.taken is ours  # type: ignore[attr-defined]
        assert {"mine": ours, "other": print} == late.REGISTRY  # type: ignore[attr-defined]
        late.again = ours  # type: ignore[attr-defined]
        patch.undo()
        assert late.taken is late.again is stock  # type: ignore[attr-defined]
        assert {"mine": stock, "other": print} == late.REGISTRY  # type: ignore[attr-defined]
    finally:
        del sys.modules[late.__name__]


def test_what_a_script_imported_from_verl_after_the_patch_comes_back_too() -> None:
    stock = functional.masked_whiten
    script = types.ModuleType("a_script")
    sys.modules["a_script"] = script
    try:
        patch.verl()
        script.whitened = functional.masked_whiten  # type: ignore[attr-defined]
        patch.undo()
        assert script.whitened is stock  # type: ignore[attr-defined]
    finally:
        del sys.modules["a_script"]


def test_a_module_imported_after_the_patch_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that defines what is replaced, and one that imports it by name while it is loaded."""
    (tmp_path / "later.py").write_text(
        "REGISTRY = {}\ndef double(x):\n    return 2 * x\nREGISTRY['double'] = double\nimport verl.of_user\n"
    )
    (tmp_path / "of_user.py").write_text("from verl.later import double\n")
    verl = importlib.import_module("verl")
    monkeypatch.setattr(verl, "__path__", [*verl.__path__, str(tmp_path)])
    rows = (
        Replacement("verl.later.double", ("x",), lambda stock, x: -stock(x), "fastreward.double", "why", lambda x: 1),
        Replacement("verl.later.other", ("x",), lambda stock, x: x, "fastreward.other", "why"),
    )
    name = Registration("verl.later.REGISTRY", lambda: {"fastreward.triple": lambda x: 3 * x}, "triples", "names")
    monkeypatch.setattr(tables, "REPLACEMENTS", rows)
    monkeypatch.setattr(tables, "REGISTRATIONS", (name,))
    told: list[str] = []
    try:
        report = patch.verl(tell=told.append)
        assert [entry.target for entry in report.pending] == [
            "verl.later.double",
            "verl.later.other",
            "verl.later.REGISTRY",
        ]
        assert not report.replaced
        later = importlib.import_module("verl.later")
        user = sys.modules["verl.of_user"]
        assert later.double(3) == user.double(3) == later.REGISTRY["double"](3) == -6
        assert later.REGISTRY["fastreward.triple"](3) == 9
        assert not report.pending
        assert "verl.of_user.double" in report.replaced[0].target
        assert report.usage["verl.later.double"].calls == 3
        assert len(told) == 1
        assert "verl.later has no other" in told[0]
        assert later.__loader__ is later.__spec__.loader
        assert type(later.__loader__).__module__ != imports.__name__

        importlib.reload(later)  # a new function, and a new registry
        assert later.double(3) == user.double(3) == later.REGISTRY["double"](3) == -6
        patch.undo()
        assert later.double(3) == user.double(3) == later.REGISTRY["double"](3) == 6
        assert "fastreward.triple" not in later.REGISTRY
        assert not any(isinstance(finder, imports.AfterImport) for finder in sys.meta_path)
    finally:
        sys.modules.pop("verl.later", None)
        sys.modules.pop("verl.of_user", None)


def test_another_source_is_left_alone_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GSPO's loss of verl 0.9.0, which has the name and parameters of 0.9.1's and aggregates in another way."""
    target = "verl.trainer.ppo.core_algos.compute_policy_loss_sapo"
    stock, told = core.compute_policy_loss_sapo, []
    monkeypatch.setitem(sources.KNOWN, target, "39332d1d8382ee38")
    report = patch.verl(tell=told.append)
    assert core.compute_policy_loss_sapo is core.POLICY_LOSS_REGISTRY["sapo"] is stock
    assert target not in report.usage
    assert ["source" in line for line in told if target in line] == [True]


def test_the_sources_are_those_of_the_tables() -> None:
    rows = {row.target for row in tables.REPLACEMENTS if type(row) is Replacement}
    assert set(sources.KNOWN) == rows


@pytest.mark.parametrize("case", ["signature", "missing", "rewritten"])
def test_what_is_not_as_expected_is_left_alone_and_told(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    target = "verl.utils.torch_functional.masked_whiten"

    def masked_whiten(values: Any, mask: Any) -> Any:
        return values

    if case == "missing":
        monkeypatch.delattr(functional, "masked_whiten")
    else:
        masked_whiten.__module__ = functional.__name__ if case == "signature" else __name__
        monkeypatch.setattr(functional, "masked_whiten", masked_whiten)
    reason = {
        "signature": "takes values, mask; expected",
        "missing": "has no masked_whiten",
        "rewritten": "own any more",
    }
    with pytest.warns(RuntimeWarning, match=reason[case]):
        report = patch.verl()
    (kept,) = [entry for entry in report.kept if entry.target == target]
    assert reason[case] in kept.why
    assert kept.why in str(report)
    assert not any(entry.target.endswith(".masked_whiten") for entry in report.replaced)
    if case != "missing":
        assert functional.masked_whiten is masked_whiten


def test_ours_has_the_name_and_the_signature_of_verls() -> None:
    """By its name Ray pickles a function: a worker calls what is bound there in its own process."""
    import pickle

    patch.verl()
    ours = functional.masked_whiten
    assert (ours.__module__, ours.__qualname__) == ("verl.utils.torch_functional", "masked_whiten")
    assert pickle.loads(pickle.dumps(ours)) is ours


def test_patching_twice_changes_nothing() -> None:
    report = patch.verl()
    before = bound()
    assert patch.verl() is report
    assert bound() == before


@pytest.mark.parametrize(
    ("version", "reason"), [("0.8.1", "found 0.8.1"), ("0.10.0", "found 0.10.0"), ("", "not inst")]
)
def test_refusals_say_why_and_change_nothing(monkeypatch: pytest.MonkeyPatch, version: str, reason: str) -> None:
    def found(_: str) -> str:
        if not version:
            raise importlib.metadata.PackageNotFoundError("verl")
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    before = bound()
    with pytest.raises(patch.PatchRefused, match=reason):
        patch.verl()
    assert bound() == before


# ---- the entry point -------------------------------------------------------------------------------------------------
PLUGIN = "fastreward.patch.verl.plugin"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as yet without effect."""
    monkeypatch.setenv("FASTREWARD_VERL", "off")
    return importlib.import_module(PLUGIN)


def test_pyproject_declares_the_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["verl.plugins"] == {"fastreward": PLUGIN}


def without_what_stays(text: str) -> list[str]:
    """Lines of stderr, but for those that an older verl gets: of its functions that have another source."""
    return [line for line in text.splitlines() if " its source is not the one that " not in line]


def test_the_plugin_says_in_one_line_what_it_serves(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FASTREWARD_VERL")
    report = plugin.apply()
    assert patch.status()["verl"] is report
    (line,) = without_what_stays(capsys.readouterr().err)
    assert f"{len(report.replaced) + len(report.pending)} functions of verl {report.version}" in line
    assert f"process {os.getpid()}" in line


@pytest.mark.parametrize("value", ["off", "OFF", "0", " no"])
def test_the_plugin_is_turned_off(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv("FASTREWARD_VERL", value)
    assert plugin.apply() is None
    assert patch.status() == {}
    assert capsys.readouterr().err == ""


def test_the_plugin_is_loud_about_what_it_could_not_do(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FASTREWARD_VERL")
    with monkeypatch.context() as context:
        context.setattr(importlib.metadata, "version", lambda _: "0.8.0")
        assert plugin.apply() is None
    assert "WARNING: fastreward.patch.verl: written for verl 0.9.x, found 0.8.0" in capsys.readouterr().err
    with monkeypatch.context() as context:
        context.setattr(apply, "AfterImport", None)
        with pytest.raises(TypeError):
            plugin.apply()
    assert "WARNING: fastreward.patch.verl could not be applied: TypeError" in capsys.readouterr().err
    with monkeypatch.context() as context:
        context.setattr(functional, "masked_whiten", print)
        report = plugin.apply()
    assert "WARNING: fastreward.patch.verl leaves verl.utils.torch_functional.masked_whiten" in capsys.readouterr().err
    assert report.kept


def test_verl_loads_the_entry_point_in_a_fresh_process(tmp_path: Path) -> None:
    """As installed: verl finds the distribution's entry point, and its modules are served as they are imported."""
    info = tmp_path / "served-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: served\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[verl.plugins]\nserved = {PLUGIN}\n")
    code = (
        "import sys, verl, fastreward.patch as patch\n"
        "assert 'verl.trainer.ppo.core_algos' not in sys.modules\n"
        "from verl.trainer.ppo import core_algos\n"
        "report = patch.status()['verl']\n"
        "assert core_algos.verl_F.masked_whiten.__wrapped__\n"
        "print(not report.pending or min(entry.why for entry in report.pending), len(report.kept))"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}", "VERL_USE_EXTERNAL_PLUGINS": "served"}
    environment.pop("FASTREWARD_VERL", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in without_what_stays(done.stderr) if line.startswith("fastreward (process")]
    assert len(lines) == 1, lines
    assert "functions of verl 0.9" in lines[0]
