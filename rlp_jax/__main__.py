# SPDX-License-Identifier: Apache-2.0
"""python -m rlp_jax: the command line."""

import sys

from rlp_jax.cli import main

sys.exit(main())
