"""The peers on this machine: imported lazily and quietly, each with the reason where it cannot take part."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from fastreward.bench.case import Case, Contender

#: Name in the tables -> module that has to import.
MODULES = {"TRL": "trl", "verl": "verl", "liger-kernel": "liger_kernel", "torchrl": "torchrl"}


_wanted = True  # False inside `left_out`


class Absent(Exception):
    """This peer does not take part; the message says why."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Peers greet, warn and log on import and on first use; a table is no place for that."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Cases that are built inside have no peers that would have to be imported, which takes seconds."""
    global _wanted
    _wanted, before = False, _wanted
    try:
        yield
    finally:
        _wanted = before


@cache
def _import(path: str) -> Any:
    with quietly():
        return importlib.import_module(path)


def load(name: str, path: str) -> Any:
    """Module `path` of peer `name`; Absent where the peer is left out, not installed or does not import."""
    if not _wanted:
        raise Absent("left out")
    if importlib.util.find_spec(MODULES[name]) is None:
        raise Absent("not installed")
    try:
        return _import(path)
    except Exception as error:  # a peer may fail in any way; that is its row, not our crash
        raise Absent(f"does not import: {type(error).__name__}: {str(error).splitlines()[0][:100]}") from error


def add(case: Case, name: str, make: Callable[[], Contender]) -> None:
    """Adds peer `name` to the case, or the reason why it is not there."""
    try:
        case.contenders.append(make())
    except Absent as reason:
        case.absent[name] = str(reason)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of `function` for this shape only; earlier graphs are dropped, so that no limit forces eager."""
    with quietly():
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)
