"""These tests need Triton's interpreter: test_interpret.py beside this folder runs them in a process of their own."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
