"""What is in a credit page, read back: the inverse of fastreward/credit_plot/packing.py, as page.js has it."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import numpy as np

_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def content(page: str) -> dict[str, Any]:
    """The page's data, with arrays for what is packed."""
    match = _DATA.search(page)
    assert match is not None
    return unpacked(json.loads(match[1]))


def unpacked(x: Any) -> Any:
    """Packed arrays as arrays, wherever they are."""
    if isinstance(x, dict) and set(x) == {"type", "planes", "length", "data"}:
        planes = np.frombuffer(zlib.decompress(base64.b64decode(x["data"])), np.uint8)
        words = np.zeros((x["length"], 4), np.uint8)
        words[:, 4 - x["planes"] :] = planes.reshape(x["planes"], x["length"]).T
        return words.view(f"<{x['type']}").reshape(-1)
    if isinstance(x, dict):
        return {name: unpacked(value) for name, value in x.items()}
    return [unpacked(value) for value in x] if isinstance(x, list) else x
