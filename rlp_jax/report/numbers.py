# SPDX-License-Identifier: Apache-2.0
"""Numbers for a reader."""

import math
import re


def form(value: float, spec: str) -> str:
    """The number as the format says, with a true minus; a dash where it is not finite, no sign on nought."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:{spec}}"
    return text.lstrip("+-") if not re.search("[1-9]", text) else text.replace("-", "−")
