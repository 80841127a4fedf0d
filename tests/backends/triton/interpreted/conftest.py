"""These tests need Triton's interpreter: tests/test_triton_interpret.py runs them in a process of their own."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
