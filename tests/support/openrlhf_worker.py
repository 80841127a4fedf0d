"""What a Ray worker of the OpenRLHF tests runs: an actor that scores with OpenRLHF's own functions."""

from __future__ import annotations

import importlib
import os
from typing import Any


class Scorer:
    """Imports OpenRLHF in its process, as OpenRLHF's actors do; nobody applies a patch here."""

    def kl(self, log_probs: Any, base: Any) -> tuple[Any, Any, int]:
        """(compute_approx_kl, what fastreward has served here, this process)."""
        from openrlhf_whole import stand_ins

        stand_ins()
        utils = importlib.import_module("openrlhf.models.utils")
        value = utils.compute_approx_kl(log_probs, base, kl_estimator="k3")
        from fastreward import patch

        report = patch.status().get("openrlhf")
        usage = None if report is None else report.usage["openrlhf.models.utils.compute_approx_kl"].calls
        return value, usage, os.getpid()
