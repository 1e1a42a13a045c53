# SPDX-License-Identifier: Apache-2.0
"""What `rlp train` takes for a run of the study: `rlp train experiments/paper/recorded.py --with settings=FILE`, a file
that `config.to_json` wrote."""

from pathlib import Path

from rlp_jax.config import Config, ConfigError
from rlp_jax.settings import from_json


def config(settings: str = "") -> Config:
    if not Path(settings).is_file():
        raise ConfigError(f"no settings file {settings!r}: the study's driver writes one for each run")
    return from_json(Path(settings).read_text(encoding="utf-8"), settings)
