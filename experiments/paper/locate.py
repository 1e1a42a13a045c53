# SPDX-License-Identifier: Apache-2.0
"""Where in text a model's thoughts pay: `python -m experiments.paper.locate MODEL --out FILE`.

`rlp eval --tasks gain`, the same for every run: held-out documents of all six corpora, positions drawn from all tokens
wherever the run itself was asked to think, with every number of the records summarised in one JSON file. A Hugging Face
directory is its own baseline; a run is measured against its moving average.
"""

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from experiments.paper import configs
from experiments.paper.examine import read_model
from rlp_jax.checkpoint import LoadedRun, load_run
from rlp_jax.checkpoints_io.load import Loaded
from rlp_jax.config import SuiteConfig
from rlp_jax.data.template import template_tokens
from rlp_jax.evals.alarms import of_run
from rlp_jax.evals.examine import fingerprint
from rlp_jax.evals.where import heldout_documents, run_gain
from rlp_jax.report.run import read_run
from rlp_jax.settings import is_run

DOCUMENTS, POSITIONS, THOUGHTS = 128, 6, 4


def locate(source: Path, documents: int = DOCUMENTS) -> dict[str, Any]:
    """What `breakdown.summarise` says of a model, of a run with its `warnings` (`alarms.of_run`).

    Args:
      source: a Hugging Face directory or a run directory, seen from a folder that has the study's data.
      documents: held-out ones, at most.

    Raises:
      ConfigError: no such model or data.
    """
    loaded: Loaded | LoadedRun = load_run(source) if is_run(source) else read_model(source)
    baseline = loaded.ema_params if isinstance(loaded, LoadedRun) else loaded.params
    config = configs.rlp()
    settings = SuiteConfig(
        samples=THOUGHTS, temperature=config.rlp.temperature, thought_tokens=config.rlp.thought_tokens,
        positions=POSITIONS, position_mode="uniform",
    )  # fmt: skip
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, documents=documents))
    config, heldout = heldout_documents(config, settings, loaded.tokenizer, None)
    template = template_tokens(config.template, loaded.tokenizer)
    weights = fingerprint((loaded.params, baseline))
    with tempfile.TemporaryDirectory() as folder:
        result = run_gain(
            loaded.model, loaded.params, baseline, loaded.tokenizer, template, config, heldout, (), weights,
            Path(folder) / "gain.jsonl", lambda text: None,
        )  # fmt: skip
    if is_run(source):
        result["warnings"] = of_run(read_run(source).metrics, len(template.close))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory or run directory")
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--out", type=Path, required=True, help="this JSON file, all of it or nothing")
    args = parser.parse_args()
    try:
        result = locate(args.model, args.documents)
    except (ValueError, OSError) as error:
        parser.exit(2, f"locate: {' '.join(str(error).split())}\n")
    partial = args.out.with_name(f"{args.out.name}.part")
    partial.write_text(json.dumps(result, allow_nan=False) + "\n")
    os.replace(partial, args.out)


if __name__ == "__main__":
    main()
