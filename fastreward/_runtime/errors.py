"""Errors of the runtime."""

from __future__ import annotations


class BackendError(RuntimeError):
    """The chosen backend cannot serve this call; the message says why and what to do."""
