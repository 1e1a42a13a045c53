# SPDX-License-Identifier: Apache-2.0
"""The tokenizer against its own definition, against transformers, and against bad files."""

import itertools
import json
import pathlib
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from rlp_jax.checkpoints_io.fetch import local_path
from rlp_jax.data.tokenizer import PRE_TOKENIZERS, Tokenizer, TokenizerError
from rlp_jax.models.presets import WEIGHTS

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "tokenizer_lines.json"
LINES = json.loads(GOLDEN.read_text(encoding="utf-8"))
TEXTS = [text for text, _ in LINES]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train(pre: str = "smollm", vocab_size: int = 700) -> tokenizers.Tokenizer:
    """A small byte-level BPE learned from the lines, with special tokens first."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def gguf_fields(backend: tokenizers.Tokenizer, pre: str = "smollm", **changes) -> dict:
    """The metadata a GGUF file of this tokenizer holds, with two unused entries at the end."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "[PAD0]", "[PAD1]"],
        "token_type": [3 if token in SPECIAL else 1 for token in tokens] + [5, 5],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


@pytest.fixture(scope="module")
def backend():
    return train()


def smollm2() -> Tokenizer:
    path = local_path(WEIGHTS["smollm2-135m-instruct"])
    if path is None:
        pytest.skip("SmolLM2-135M-Instruct is not on this machine: rlp convert smollm2-135m-instruct fetches it")
    import gguf

    fields = gguf.GGUFReader(path).fields
    return Tokenizer.from_gguf({key: f.contents() for key, f in fields.items() if "tokenizer" in key}, str(path))


def test_smollm2_matches_goldens():
    tokenizer = smollm2()
    assert len(LINES) > 350
    wrong = [text for text, ids in LINES if tokenizer.encode(text) != ids]
    assert wrong == []
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (49152, None, (2,), 2)


def test_decode_inverts_encode(backend):
    tokenizer = Tokenizer(backend)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    assert tokenizer.decode([tokenizer.vocab_size + 5, *tokenizer.encode("abc")]) == "abc"


def test_offsets_cover_the_text(backend):
    tokenizer = Tokenizer(backend)
    for text in TEXTS:
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert len(ids) == len(offsets)
        covered = 0
        for start, end in offsets:
            # The next token starts where the last ended, or shares its (multi-byte) character.
            assert start <= covered <= end <= len(text)
            assert end > start
            covered = end
        assert covered == len(text)


def test_offsets_keep_leading_spaces_despite_a_trimming_post_processor(backend):
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "def main (x)"
    _, offsets = Tokenizer(copy).encode_with_offsets(text)
    assert "".join(text[start:end] for start, end in offsets) == text


def test_padding_and_truncation_of_the_file_are_ignored(backend):
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.enable_truncation(3)
    copy.enable_padding(length=50)
    assert Tokenizer(copy).encode("a b c d e f g") == Tokenizer(backend).encode("a b c d e f g")


def test_special_tokens_are_found_in_text_but_never_added(backend):
    tokenizer = Tokenizer(backend, bos_id=0, eos_ids=(2,))
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, *tokenizer.encode("a"), 2]
    assert tokenizer.encode("") == []
    assert tokenizer.pad_id == 2


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_gguf_metadata_gives_the_same_ids(pre):
    backend = train(pre)
    tokenizer = Tokenizer.from_gguf(gguf_fields(backend, pre), "x.gguf")
    expected = backend
    if pre == "qwen2":  # the family's normalizer, which the little tokenizer was trained without
        expected.normalizer = tokenizers.normalizers.NFC()
    if pre == "llama-bpe":
        expected.model.ignore_merges = True
    assert [tokenizer.encode(text) for text in TEXTS] == [expected.encode(text).ids for text in TEXTS]
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.bos_id == (1 if pre == "llama-bpe" else None)


def test_pre_tokenizers_split_digits_as_their_families_do():
    def split(pre, text):
        return [text[start:end] for _, (start, end) in PRE_TOKENIZERS[pre]().pre_tokenize_str(text)]

    text = "x 1234½ it's IT'S\n\n  y"
    assert split("smollm", text) == ["x", " ", "1", "2", "3", "4", "½", " it", "'s", " IT", "'", "S", "\n\n ", " y"]
    assert split("gpt-2", text) == ["x", " 1234½", " it", "'s", " IT", "'", "S", "\n\n ", " y"]
    assert split("qwen2", text) == ["x", " ", "1", "2", "3", "4", "½", " it", "'s", " IT", "'S", "\n\n", " ", " y"]
    assert split("llama-bpe", text) == ["x", " ", "123", "4½", " it", "'s", " IT", "'S", "\n\n", " ", " y"]


def reference_bpe(word: bytes, vocab: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Byte-pair encoding by its definition: merge the lowest-ranked pair, leftmost first, until none is left."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    parts = [spelling[byte] for byte in word]
    while len(parts) > 1:
        rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [vocab[part] for part in parts]


def test_smollm_rule_by_definition(backend):
    """The file format's own rule for "smollm": single numerals, then GPT-2's pattern, then byte-pair merges."""
    regex = pytest.importorskip("regex")
    model = json.loads(backend.to_str())["model"]
    ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer.from_gguf(gguf_fields(backend), "x.gguf")
    for text in TEXTS:
        ids = []
        for piece in regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", text):
            if piece in SPECIAL:
                ids.append(model["vocab"][piece])
                continue
            for part in regex.findall(r"\p{N}|\P{N}+", piece):
                for word in pattern.findall(part):
                    ids += reference_bpe(word.encode(), model["vocab"], ranks)
        assert tokenizer.encode(text) == ids, text


def test_save_and_read_back(backend, tmp_path):
    tokenizer = Tokenizer.from_gguf(
        gguf_fields(backend, add_bos_token=True) | {"tokenizer.chat_template": "{{ messages }}"}, "x.gguf"
    )
    tokenizer.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert (again.bos_id, again.eos_ids, again.pad_id, again.vocab_size) == (1, (2,), 2, tokenizer.vocab_size)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("settings", "template", "bos_id"),
    [
        ({"bos_token": "<|im_start|>"}, False, None),  # SmolLM2, Qwen3: a name, but nothing puts it there
        ({"bos_token": "<|im_start|>"}, True, 1),  # Llama 3: the post-processor does
        ({"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True}, False, 1),  # Llama 2
        ({"bos_token": "<|im_start|>", "add_bos_token": False}, True, None),
    ],
)
def test_bos_only_where_the_family_prepends_one(backend, tmp_path, settings, template, bos_id):
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    if template:
        copy.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    copy.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.bos_id == bos_id
    assert tokenizer.eos_ids == (2, 0)
    assert tokenizer.pad_id == 2


def test_bad_files_are_one_clear_line(tmp_path):
    def message() -> str:
        with pytest.raises(TokenizerError) as error:
            Tokenizer.from_directory(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "tokenizer.json: no such file" in message()
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert "tokenizer.model alone is not read" in message()
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    assert "tokenizer.json: cannot be read" in message()
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    assert "tokenizer.json: cannot be read" in message()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'"),
        ({"tokens": None}, "do not fit together"),
        ({"token_type": [1]}, "do not fit together"),
        ({"merges": ["a b c"]}, "do not fit together"),
        ({"merges": ["a notthere"]}, "merges do not fit the tokens"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000"),
    ],
)
def test_bad_gguf_metadata_is_one_clear_line(backend, changes, words):
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_gguf(gguf_fields(backend, **changes), "x.gguf")
    assert str(error.value).startswith("x.gguf: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parity
@pytest.mark.parametrize("adds_bos", [False, True])
def test_transformers_reads_what_save_writes(backend, tmp_path, adds_bos):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_gguf(gguf_fields(backend, add_bos_token=adds_bos), "x.gguf")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs(text).input_ids == ([1] if adds_bos else []) + ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)


@pytest.mark.parity
@pytest.mark.slow
def test_smollm2_equals_transformers_own_reading(tmp_path):
    transformers = pytest.importorskip("transformers")
    smollm2().save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(text, add_special_tokens=False).input_ids for text in TEXTS] == [ids for _, ids in LINES]


# ------------------------------------------------------------------------------------------------- SentencePiece


PIECES = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "ca", "cab", "▁▁", "aa"]


def scored_fields(order, **changes):
    """A SentencePiece vocabulary: special tokens, bytes, then pieces, those earlier in `order` with higher scores."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<tag>", "  "]
    types = [3, 3, 3, 2, 4, 4]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + order
    types += [6] * 256 + [1] * len(order)
    scores = [-1000.0] * 6 + [0.0] * 256 + [-float(i) for i in range(len(order))]
    fields = {
        "model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "unknown_token_id": 3,
        "bos_token_id": 2, "eos_token_id": 1, "padding_token_id": 0, "add_bos_token": True, "add_space_prefix": False,
        **changes,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def merged_by_score(text: str, fields: dict) -> list[int]:
    """The definition: of all neighbours that make a piece, join those of the highest score, the leftmost first."""
    tokens = ["▁▁" if token == "  " else token for token in fields["tokenizer.ggml.tokens"]]
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True)) | {"▁▁": 0.0}
    parts = list(text.replace(" ", "▁"))
    while True:
        found = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        ids += [tokens.index(part)] if part in tokens else [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
    return ids


@pytest.mark.parametrize("seed", range(4))
def test_scores_become_merges(seed):
    random_ = random.Random(seed)
    order = [piece for piece in PIECES if piece != "▁▁"]
    random_.shuffle(order)
    fields = scored_fields(order)
    tokenizer = Tokenizer.from_gguf(fields, "x.gguf")
    for _ in range(60):
        text = "".join(random_.choice("aabbcc  é\n") for _ in range(random_.randint(0, 14)))
        assert tokenizer.encode(text) == merged_by_score(text, fields), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<tag><bos>b") == [*tokenizer.encode("a"), 4, 2, *tokenizer.encode("b")]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)


def test_space_before_the_text_only_where_the_file_says_so(tmp_path):
    plain, prefixed, silent = (
        Tokenizer.from_gguf(scored_fields(PIECES, add_space_prefix=value), "x.gguf") for value in (False, True, None)
    )
    assert prefixed.encode("ab") == silent.encode("ab") == plain.encode(" ab") != plain.encode("ab")
    assert prefixed.decode(prefixed.encode("ab c")) == "ab c"
    prefixed.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert again.encode("ab c") == prefixed.encode("ab c") and again.bos_id == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": None}, "tokens, token_type and scores do not fit together"),
        ({"scores": [0.0]}, "tokens, token_type and scores do not fit together"),
        ({"tokens": None}, "tokens, token_type and scores do not fit together"),
        ({"unknown_token_id": 10**6}, "unknown_token_id is 1000000"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
    ],
)
def test_bad_scores_are_one_clear_line(changes, words):
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_gguf(scored_fields(PIECES, **changes), "x.gguf")
    assert words in str(error.value) and str(error.value).startswith("x.gguf: ") and "\n" not in str(error.value)


@pytest.mark.slow
def test_gemma3_matches_its_published_tokenizer():
    path = local_path(WEIGHTS["gemma3-270m"])
    if path is None:
        pytest.skip("Gemma-3-270M is not on this machine: rlp convert gemma3-270m fetches it")
    import gguf

    fields = {key: f.contents() for key, f in gguf.GGUFReader(path).fields.items() if "tokenizer" in key}
    tokenizer = Tokenizer.from_gguf(fields, str(path))
    lines = json.loads((GOLDEN.parent / "gemma3_lines.json").read_text(encoding="utf-8"))
    assert len(lines) > 55
    assert [text for text, ids in lines if tokenizer.encode(text) != ids] == []
    assert [text for text, ids in lines if tokenizer.decode(ids) != text and "▁" not in text] == []
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (262_144, 2, (1,), 0)
