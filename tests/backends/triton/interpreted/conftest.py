"""The Triton kernels' numerics without a GPU: collected where TRITON_INTERPRET=1, by a pytest run of their own.

Triton reads the variable when it is imported, and then it holds for the whole process. `make test` runs both.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
