# SPDX-License-Identifier: Apache-2.0
"""The template's tokens, and what does not fit."""

import dataclasses

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from rlp_jax.config import Config, ConfigError, DataConfig, RLPConfig, Template
from rlp_jax.data.template import TemplateTokens, check_lengths, template_tokens
from rlp_jax.data.tokenizer import Tokenizer

TEMPLATE = Template(instruction="Think.\n", open="<t>", close="</t>")


def byte_tokenizer(bos_id=None):
    """One token a byte, a real tokenizer of 256 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, bos_id=bos_id)


def test_tokens_without_bos():
    tokenizer = byte_tokenizer()
    tokens = template_tokens(TEMPLATE, tokenizer)
    assert tokens.plain == ()
    assert [tokenizer.decode(part) for part in (tokens.context, tokens.open, tokens.close)] == [
        "Think.\n",
        "<t>",
        "</t>",
    ]
    assert tokens.first == 1


def test_bos_precedes_plain_documents_and_the_instruction():
    tokens = template_tokens(TEMPLATE, byte_tokenizer(bos_id=7))
    assert tokens.plain == (7,)
    assert tokens.context == (7, *template_tokens(TEMPLATE, byte_tokenizer()).context)
    assert 7 not in tokens.open + tokens.close
    assert tokens.first == 0


def test_instruction_may_be_empty():
    template = dataclasses.replace(TEMPLATE, instruction="")
    assert template_tokens(template, byte_tokenizer()).context == ()
    assert template_tokens(template, byte_tokenizer(bos_id=7)).context == (7,)


def test_what_ends_a_response():
    tokenizer = byte_tokenizer()
    assert (template_tokens(TEMPLATE, tokenizer).end, template_tokens(TEMPLATE, tokenizer).eos) == ((), ())
    with_eos = Tokenizer(tokenizer._backend, eos_ids=(9, 8))
    assert (template_tokens(TEMPLATE, with_eos).end, template_tokens(TEMPLATE, with_eos).eos) == ((9,), (9, 8))
    own = template_tokens(dataclasses.replace(TEMPLATE, end="\n\n"), with_eos)
    assert (tokenizer.decode(own.end), own.eos) == ("\n\n", (9, 8))


def test_a_response_needs_an_end_and_room_for_it():
    tokens = TemplateTokens(plain=(), context=(1,) * 10, open=(2,) * 3, close=(3,) * 4)
    rpt = dataclasses.replace(config(), algorithm="rpt")
    with pytest.raises(ConfigError, match=r"template.end is ''.*give the text that ends a response"):
        check_lengths(tokens, rpt, 1000)
    check_lengths(tokens, config(), 1000)
    check_lengths(tokens._replace(end=(4,) * 7), rpt, 10 + 100 + 3 + 50 + 7 + 4)
    with pytest.raises(ConfigError, match="end of a response 7 "):
        check_lengths(tokens._replace(end=(4,) * 7), rpt, 10 + 100 + 3 + 50 + 7 + 3)


@pytest.mark.parametrize("name", ["open", "close"])
def test_tags_may_not_be_empty(name):
    with pytest.raises(ConfigError, match=rf"template\.{name} is ''"):
        template_tokens(dataclasses.replace(TEMPLATE, **{name: ""}), byte_tokenizer())


def config(document_tokens=100, thought_tokens=50, horizon=4, min_tokens=8):
    return Config(
        data=DataConfig(document_tokens=document_tokens, min_tokens=min_tokens),
        rlp=RLPConfig(thought_tokens=thought_tokens, horizon=horizon),
    )


def test_lengths_fit_up_to_the_last_position():
    tokens = TemplateTokens(plain=(), context=(1,) * 10, open=(2,) * 3, close=(3,) * 4)
    needed = 10 + 100 + 3 + 50 + 4 + 4
    check_lengths(tokens, config(), needed)
    with pytest.raises(ConfigError) as caught:
        check_lengths(tokens, config(), needed - 1)
    assert str(caught.value) == (
        "instruction 10 + data.document_tokens 100 + opening tag 3 + rlp.thought_tokens 50 + closing tag 4 + "
        "rlp.horizon 4 = 171 tokens, but the model's context holds 170: lower data.document_tokens or "
        "rlp.thought_tokens"
    )


def test_shortest_document_must_have_a_position():
    with_bos = TemplateTokens(plain=(1,), context=(1, 2), open=(2,), close=(3,))
    check_lengths(with_bos, config(horizon=8, min_tokens=8), 1000)
    with pytest.raises(ConfigError, match=r"data\.min_tokens is 8.*raise data\.min_tokens to 9"):
        check_lengths(with_bos._replace(plain=()), config(horizon=8, min_tokens=8), 1000)
