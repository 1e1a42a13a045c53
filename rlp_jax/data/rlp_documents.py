# SPDX-License-Identifier: Apache-2.0
"""`rlp_documents`, a dataset builder of tensorflow-datasets: any of our sources as ArrayRecord files with spans,
answers and places, in the order of the sources. Reads and writes without TensorFlow.

Importing this module makes the builder known to `tfds.builder`; reading a prepared dataset does not need it.
"""

import contextlib
import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlp_jax.config import ConfigError, DataConfig
from rlp_jax.data.documents import Malformed
from rlp_jax.data.filters import Filtered
from rlp_jax.data.sources import open_each


@dataclasses.dataclass(eq=False, kw_only=True)
class DocumentsConfig(tfds.core.BuilderConfig):
    """What to write: the config's name is the dataset's, `rlp_documents/NAME`."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    seed: int = 0
    filtered: Filtered = dataclasses.field(default_factory=Filtered)


class RlpDocuments(tfds.core.GeneratorBasedBuilder):
    """Documents: text, spans (character ranges), answer, and the place that each came from."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        spans = tfds.features.Sequence({"start": np.int64, "end": np.int64})
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documents for reinforcement as a pretraining objective, written by rlp_jax.",
            features=tfds.features.FeaturesDict({"text": text(), "spans": spans, "answer": text(), "place": text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, download_manager) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        data, number = self.builder_config.data, 0
        for sources in open_each(data, self.builder_config.seed):
            left = data.documents or None
            for source in sources:
                stop = left if source.length is None else min(source.length, left or source.length)
                for found in source.read(0, stop if stop is not None else 2**62):
                    if left is not None:
                        left -= 1
                    if isinstance(found, Malformed):
                        if data.malformed == "stop":
                            raise found
                        kind = "encoding" if found.encoding else "malformed"
                        self.builder_config.filtered.add(kind, found.place, found.reason, found.text)
                        continue
                    spans = [{"start": start, "end": end} for start, end in found.spans]
                    yield number, {"text": found.text, "spans": spans, "answer": found.answer, "place": found.name}
                    number += 1
                if left == 0:
                    break


def build(name: str, data: DataConfig, directory: Path, seed: int = 0) -> tuple[Path, int, Filtered]:
    """Writes rlp_documents/NAME below a directory.

    Args:
      name: of the dataset.
      data: sources, format strings, `documents` and `malformed` of it count.
      directory: as TFDS_DATA_DIR names it to readers.
      seed: of generators.

    Returns:
      The dataset's own directory, how many documents it holds, and what was left out.

    Raises:
      ConfigError: a source that cannot be read, a bad name, or there is such a dataset already.
    """
    if not name.isidentifier():
        raise ConfigError(f"--name {name}: write letters, digits and underscores, a letter first")
    config = DocumentsConfig(name=name, data=data, seed=seed)
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.display_progress_bar(False)
    builder = RlpDocuments(config=config, data_dir=directory, file_format="array_record")
    if Path(builder.data_dir).exists():
        raise ConfigError(f"{builder.data_dir} is there already: choose another --name, or delete it")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it tells of downloads, and there are none
            builder.download_and_prepare()
    except BaseException:
        shutil.rmtree(Path(builder.data_dir).parent)
        raise
    return Path(builder.data_dir), builder.info.splits["train"].num_examples, config.filtered
