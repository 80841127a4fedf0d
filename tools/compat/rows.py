"""What `make compat` tries: versions of trainers, torch, Python and Triton, and the tests that each is put through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

#: Versions of each trainer that is on a package index: those that are claimed, oldest first; the last is the one of
#: constraints.txt.
TRAINERS: Final[dict[str, tuple[str, ...]]] = {
    "trl": ("1.14.2", "1.15.0", "1.16.0"),
    "verl": ("0.9.0", "0.9.1"),
    "openrlhf": ("0.11.2",),
}
#: Trainers that are on none: their formulas are written out in tests/support, from these commits.
COMMITS: Final = {"slime": "00c2d6d", "prime-rl": "559b447"}

#: Operations on the CPU with their custom ops under opcheck, gradients, padded and packed: a core of tests/operations.
CORE: Final = tuple(
    f"tests/operations/test_{name}.py" for name in ("logprobs", "policy_loss", "value_loss", "whiten", "group")
)
#: Kernels, interpreted (some of each kind) and compiled.
INTERPRETED: Final = tuple(f"tests/backends/triton/interpreted/test_{name}.py" for name in ("group", "whiten"))
COMPILED: Final = ("tests/backends/triton/test_compile.py", "tests/backends/triton/test_program_compile.py")


@dataclass(frozen=True, slots=True)
class Row:
    """A version, and what has to hold in an environment that has it.

    Attributes:
        kind: trl, verl, openrlhf, slime, prime-rl, torch, python, triton (interpreted) or compiled (by Triton).
        version: of that.
        tests: arguments of pytest; a pattern of a trainer's files.
        install: what its environment has beside the packages of this one. () for what is installed here anyway.
        alone: whether what `install` depends on is taken from this environment.
        note: what the page says of it.
        options: of pytest.
        environment: variables that the tests are run with, and their values.
    """

    kind: str
    version: str
    tests: tuple[str, ...]
    install: tuple[str, ...] = ()
    alone: bool = True
    note: str = ""
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.kind}-{self.version}"


def rows() -> list[Row]:
    """All of them, in the page's order."""
    found = []
    for trainer, versions in TRAINERS.items():
        tests = (f"tests/peers/test_patch_{trainer}*.py",)
        # Of an older one the patch tells what it leaves to it, which is a RuntimeWarning.
        options = ("-W", f"ignore:fastreward.patch.{trainer} leaves:RuntimeWarning")
        for version in versions:
            row = Row(trainer, version, tests, (f"{trainer}=={version}",), options=options)
            if row.name == "trl-1.15.0":
                note = "its fused head, a Triton kernel, in Triton's interpreter"
                row = replace(row, note=note, environment=(("TRITON_INTERPRET", "1"),))
            found.append(row if version != versions[-1] else replace(row, options=()))
    for trainer, commit in COMMITS.items():
        found.append(Row(trainer, commit, (f"tests/peers/test_patch_{trainer.replace('-', '_')}*.py",)))
    for version in ("2.13.0", "2.14.1", "2.15.0"):
        found.append(Row("torch", version, CORE, (f"torch=={version}",), alone=False))
    for version in ("3.11", "3.12", "3.13", "3.14"):
        # torch warns of 3.13.0, whose guards are slower than those of 3.13.1.
        options = ("-W", "ignore:Guards may run slower:RuntimeWarning") if version == "3.13" else ()
        found.append(Row("python", version, CORE, options=options))
    for version in ("3.6.0", "3.7.1", "3.8.0", "3.9.0"):
        install, note, options = (f"triton=={version}",), "", ()
        if (
            version == "3.6.0"
        ):  # its interpreter makes numbers of arrays [1], which NumPy 2.3 deprecates and 2.4 refuses
            install, note = (*install, "numpy==2.3.5"), "with NumPy 2.3: its interpreter does not take 2.4"
            options = ("-W", "ignore:Conversion of an array:DeprecationWarning")
        found.append(Row("triton", version, INTERPRETED, install, note=note, options=options))
    for version in ("3.6.0", "3.7.1", "3.8.0", "3.9.0"):
        found.append(Row("compiled", version, COMPILED, (f"triton=={version}",)))
    return found
