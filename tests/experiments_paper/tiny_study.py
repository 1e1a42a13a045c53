# SPDX-License-Identifier: Apache-2.0
"""The study in small: `python tiny_study.py [arguments of the driver]`. One base, a sweep of two rates, RLP and CPT."""

import dataclasses
import sys
from pathlib import Path
from unittest import mock

import jax

from experiments.paper import configs, data_files, drive, study
from experiments.paper.domains import TOKENIZER
from experiments.paper.study import Run, Study
from rlp_jax.checkpoints_io.load import save_hf
from rlp_jax.config import EvalConfig
from rlp_jax.models.transformer import LanguageModel, ModelConfig

MODEL = ModelConfig(
    "llama", vocab_size=TOKENIZER.vocab_size, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16,
    tie_embeddings=True, max_positions=96,
)  # fmt: skip


def tiny(config):
    rlp = dataclasses.replace(config.rlp, group_size=2, thought_tokens=4)
    evaluation = EvalConfig(documents=4, group_size=2, batch_documents=4)
    data = dataclasses.replace(config.data, sources=configs.corpora("arithmetic", "compose"), heldout_fraction=0.3)
    return dataclasses.replace(config, steps=2, batch_documents=4, rlp=rlp, eval=evaluation, data=data)


def tiny_study() -> Study:
    base, *rates = study.base_run("tiny"), *study.sweep_of("tiny", "rlp")
    rlp = study.main_run("tiny", "rlp", 1)
    cpt = dataclasses.replace(study.main_run("tiny", "cpt_flops", 1), rate_from=rlp.rate_from)
    runs = (base, *rates[:2], rlp, cpt)
    return Study(
        tuple(run if run.config is None else dataclasses.replace(run, config=tiny(run.config)) for run in runs),
        ("tiny",),
        problems=2,
    )


def broken_run() -> Run:
    """One that ends at once: there are not so many documents."""
    run = tiny_study().runs[1]
    config = dataclasses.replace(run.config, batch_documents=512)
    return dataclasses.replace(run, name="broken", sweep="", rate_from="", config=config)


def prepare(work: Path) -> None:
    """Data and base, as the driver would have made them."""
    problems = {name: (split, 3) for name, (split, _) in data_files.PROBLEMS.items()}
    sizes = {"DOCUMENTS": 24, "LONG_DOCUMENTS": 24, "PROBLEMS": problems, "SFT_EXAMPLES": 4}
    with mock.patch.multiple(data_files, **sizes):
        data_files.write_data(work / "data")
    model = LanguageModel(MODEL)
    (work / "bases").mkdir()
    save_hf(work / "bases" / "tiny", model, model.init(jax.random.key(0)), TOKENIZER)


if __name__ == "__main__":
    sys.exit(drive.main(sys.argv[1:], tiny_study()))
