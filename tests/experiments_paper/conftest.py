# SPDX-License-Identifier: Apache-2.0
"""`experiments` is found from any working directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
