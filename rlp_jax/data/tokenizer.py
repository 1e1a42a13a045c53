# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: the `tokenizers` library, read from tokenizer.json or built from GGUF metadata.

Ids equal those of transformers' fast tokenizer with `add_special_tokens=False`. Like there, the text of a special
token ("<|im_end|>") inside a document becomes that token.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend


class TokenizerError(ValueError):
    """A tokenizer that cannot be read: one line naming the file, the field and what to do."""


class Tokenizer:
    """A tokenizer and the ids a language model's documents need.

    Attributes:
      vocab_size: one more than the largest id; a model's embedding may be larger (padded), never smaller.
      bos_id: put before every document, or None where the model family does not expect one (SmolLM2, Qwen3).
      eos_ids: ids that end a text, perhaps none.
      pad_id: fills the right end of a batch.
    """

    def __init__(
        self,
        backend: Backend,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        """Wraps a `tokenizers.Tokenizer`.

        Args:
          backend: the library's tokenizer; it is copied.
          bos_id, eos_ids, pad_id: see the class; pad_id defaults to the first of eos_ids, else 0.
          settings: what `save` writes to tokenizer_config.json; by default made from the ids.
        """
        backend = Backend.from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        self._json = backend.to_str()
        # Special tokens are never added here, so all a post-processor could still do is to trim offsets.
        backend.post_processor = None
        self._backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id if pad_id is not None else next(iter(self.eos_ids), 0)
        self._settings = dict(settings) if settings is not None else self._default_settings()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the range [start, end) of characters of `text` it comes from.

        Leading spaces belong to their token. Tokens that are parts of one character share that character's range.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included; ids beyond the vocabulary (a padded embedding's) give nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact spelling in the vocabulary."""
        return self._backend.token_to_id(token)

    def same_tokens(self, other: "Tokenizer") -> bool:
        """Whether both have the same tokens under the same ids."""
        return self._backend.get_vocab(True) == other._backend.get_vocab(True)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the tokens of a text."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @property
    def named_bos_id(self) -> int | None:
        """The token that the tokenizer's settings call BOS, also where texts are not begun with it."""
        token = self._settings.get("bos_token")
        return self.token_id(token["content"] if isinstance(token, dict) else token) if token else None

    def save(self, directory: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads them."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._json, encoding="utf-8")
        settings = json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(settings, encoding="utf-8")

    def _default_settings(self) -> dict[str, Any]:
        def token(token_id):
            return None if token_id is None else self._backend.id_to_token(token_id)

        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.bos_id is not None,
            "bos_token": token(self.bos_id),
            "eos_token": token(next(iter(self.eos_ids), None)),
            "pad_token": token(self.pad_id),
            "clean_up_tokenization_spaces": False,
        }

    @classmethod
    def from_directory(cls, directory: str | os.PathLike) -> "Tokenizer":
        """Reads tokenizer.json; special ids come from tokenizer_config.json, generation_config.json and config.json.

        Raises:
          TokenizerError: no tokenizer.json, or one that cannot be read.
        """
        directory = pathlib.Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            other = directory / "tokenizer.model"
            hint = f"; {other.name} alone is not read, convert it with transformers" if other.is_file() else ""
            raise TokenizerError(f"{path}: no such file{hint}")
        try:
            backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path}: cannot be read ({_one_line(error)})") from None
        settings = _json_or_empty(directory / "tokenizer_config.json")
        if (template := directory / "chat_template.jinja").is_file() and "chat_template" not in settings:
            settings["chat_template"] = template.read_text(encoding="utf-8")
        configs = [_json_or_empty(directory / name) for name in ("generation_config.json", "config.json")]

        def named(key: str) -> list[int]:
            value = settings.get(f"{key}_token")
            token_id = backend.token_to_id(value["content"] if isinstance(value, dict) else value) if value else None
            return [] if token_id is None else [token_id]

        def configured(key: str) -> list[int]:
            values = [config.get(f"{key}_token_id") for config in configs]
            return [i for value in values for i in (value if isinstance(value, list) else [value]) if i is not None]

        bos_id = _prepended(backend)
        if settings.get("add_bos_token") is False:
            bos_id = None
        elif settings.get("add_bos_token") and bos_id is None:
            bos_id = next(iter(named("bos") + configured("bos")), None)
        return cls(
            backend,
            bos_id=bos_id,
            eos_ids=tuple(dict.fromkeys(named("eos") + configured("eos"))),
            pad_id=next(iter(named("pad") + configured("pad")), None),
            settings=settings or None,
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], source: str) -> "Tokenizer":
        """Builds the tokenizer in the tokenizer.ggml.* metadata of a GGUF file: byte-level BPE or SentencePiece's BPE.

        Args:
          fields: the file's metadata, by full name.
          source: the file, for messages.

        Raises:
          TokenizerError: another kind of tokenizer, an unknown pre-tokenizer, or damaged metadata.
        """
        kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
        if kind == "llama":
            return cls._from_scores(fields, source)
        if kind != "gpt2":
            raise TokenizerError(
                f"{source}: tokenizer.ggml.model is {kind!r}; supported: 'gpt2' (byte-level BPE), "
                "'llama' (SentencePiece BPE)"
            )
        if pre not in PRE_TOKENIZERS:
            raise TokenizerError(f"{source}: tokenizer.ggml.pre is {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}")
        tokens = fields.get("tokenizer.ggml.tokens") or []
        types = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
        merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges") or []]
        if not tokens or len(types) != len(tokens) or any(len(merge) != 2 for merge in merges):
            raise TokenizerError(f"{source}: tokenizer.ggml.tokens, token_type and merges do not fit together")
        # Unused entries only fill the embedding up to a round size.
        vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
        try:
            backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(
                f"{source}: tokenizer.ggml.merges do not fit the tokens ({_one_line(error)})"
            ) from None
        if pre in _QWEN:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
        backend.decoder = decoders.ByteLevel()
        _add_tokens(backend, tokens, types)
        return cls._with_gguf_ids(backend, fields, tokens, pre in _LLAMA3, source)

    @classmethod
    def _from_scores(cls, fields: Mapping[str, Any], source: str) -> "Tokenizer":
        """SentencePiece's BPE (Gemma, Llama 2): pieces with scores, a piece of the higher score is merged first."""
        tokens = list(fields.get("tokenizer.ggml.tokens") or [])
        scores = fields.get("tokenizer.ggml.scores") or []
        types = fields.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
        if not tokens or len(types) != len(tokens) or len(scores) != len(tokens):
            raise TokenizerError(f"{source}: tokenizer.ggml.tokens, token_type and scores do not fit together")
        for i, kind in enumerate(types):
            if kind == _USER_DEFINED:  # stored as the text they stand for, not as pieces
                tokens[i] = tokens[i].replace(" ", _SPACE)
        vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
        unknown = fields.get("tokenizer.ggml.unknown_token_id")
        if unknown is not None and not 0 <= unknown < len(tokens):
            raise TokenizerError(f"{source}: tokenizer.ggml.unknown_token_id is {unknown}, not a token")
        backend = Backend(
            models.BPE(
                vocab=vocab,
                merges=merges_of_scores(vocab, scores, types),
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        spaces, readable = normalizers.Replace(" ", _SPACE), [decoders.Replace(_SPACE, " "), decoders.ByteFallback()]
        if fields.get("tokenizer.ggml.add_space_prefix", True):
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
            backend.decoder = decoders.Sequence([*readable, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        else:
            backend.normalizer = spaces
            backend.decoder = decoders.Sequence([*readable, decoders.Fuse()])
        _add_tokens(backend, tokens, types)
        return cls._with_gguf_ids(backend, fields, tokens, True, source)

    @classmethod
    def _with_gguf_ids(
        cls, backend: Backend, fields: Mapping[str, Any], tokens, bos_by_default: bool, source: str
    ) -> "Tokenizer":
        ids = {key: fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "padding")}
        for key, token_id in ids.items():
            if token_id is not None and not 0 <= token_id < len(tokens):
                raise TokenizerError(f"{source}: tokenizer.ggml.{key}_token_id is {token_id}, not a token")
        adds_bos = fields.get("tokenizer.ggml.add_bos_token", bos_by_default)
        bos_id = ids["bos"] if adds_bos else None
        if bos_id is not None:
            bos = tokens[bos_id]
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
            )
        eos_ids = tuple(dict.fromkeys(i for i in (ids["eos"], ids["eot"]) if i is not None))
        tokenizer = cls(backend, bos_id=bos_id, eos_ids=eos_ids, pad_id=ids["padding"])
        if ids["bos"] is not None:
            tokenizer._settings["bos_token"] = tokens[ids["bos"]]
        if fields.get("tokenizer.chat_template"):
            tokenizer._settings["chat_template"] = fields["tokenizer.chat_template"]
        return tokenizer


# Token types of GGUF.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_SPACE = "\u2581"  # how SentencePiece writes a space


def merges_of_scores(vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges of a byte-pair encoding that SentencePiece stores as pieces with scores, the first merge first.

    Every split of a piece into two pieces is a merge, ranked by the whole piece's score, then by the longer left part.
    User-defined pieces score 0, above all others (GGUF overwrites their score).
    """
    merges = []
    for piece, i in vocab.items():
        if types[i] not in (_NORMAL, _USER_DEFINED):
            continue
        score = 0.0 if types[i] == _USER_DEFINED else scores[i]
        for at in range(len(piece) - 1, 0, -1):
            left, right = piece[:at], piece[at:]
            if left in vocab and right in vocab:
                merges.append((-score, -at, at - len(piece), i, left, right))
    merges.sort(key=lambda merge: merge[:4])
    return [merge[4:] for merge in merges]


def _add_tokens(backend: Backend, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Marks the tokens that are found in a text before it is split any further."""
    for kind, special, add in (
        (_CONTROL, True, backend.add_special_tokens),
        (_USER_DEFINED, False, backend.add_tokens),
    ):
        found = [token for token, of in zip(tokens, types, strict=True) if of == kind]
        add([AddedToken(token, normalized=False, special=special) for token in found])


_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN = ("qwen2",)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    """Every digit on its own, then GPT-2's rule: SmolLM2's tokenizer.json."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _pattern(digits: str) -> pre_tokenizers.PreTokenizer:
    """The tokenizer.json of Qwen2 and 3 and of Llama 3, which differ in how many digits stay together."""
    pattern = _CONTRACTIONS + _WORDS + digits + _REST
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _llama3() -> pre_tokenizers.PreTokenizer:
    return _pattern(r"\p{N}{1,3}")


# tokenizer.ggml.pre -> its splitting rule. A file that says "default" or nothing leaves the rule open: GPT-2's.
PRE_TOKENIZERS = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "qwen2": lambda: _pattern(r"\p{N}"),
    **dict.fromkeys(_LLAMA3, _llama3),
}


def _prepended(backend: Backend) -> int | None:
    """The special token the post-processor puts before a text, if it does."""
    with_special, without = (backend.encode("a", add_special_tokens=flag).ids for flag in (True, False))
    starts = with_special[1 : 1 + len(without)] == without and len(with_special) > len(without)
    return with_special[0] if starts and with_special[: len(without)] != without else None


def _json_or_empty(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TokenizerError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
