# SPDX-License-Identifier: Apache-2.0
"""The template's tokens, and whether everything fits into the model's context."""

from typing import NamedTuple

from rlp_jax.config import RESPONDING, Config, ConfigError, Template


class TemplateTokens(NamedTuple):
    """What stands around documents and thoughts, as tokens.

    plain: before a plain document, as the baseline reads it: (BOS,) or ().
    context: before a document that is thought about: BOS where there is one, then the instruction.
    open, close: around a thought.
    end: of a response; () where neither template nor tokenizer has one.
    eos: end-of-text tokens, any of which ends a response as well.
    """

    plain: tuple[int, ...]
    context: tuple[int, ...]
    open: tuple[int, ...]
    close: tuple[int, ...]
    end: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """The first position that can be predicted: 0 after a BOS token, else 1."""
        return 0 if self.plain else 1


def template_tokens(template: Template, tokenizer) -> TemplateTokens:
    """Encode the template.

    Raises:
      ConfigError: `open` or `close` gives no token.
    """
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    tokens = TemplateTokens(
        plain=bos,
        context=bos + tuple(tokenizer.encode(template.instruction)),
        open=tuple(tokenizer.encode(template.open)),
        close=tuple(tokenizer.encode(template.close)),
        end=tuple(tokenizer.encode(template.end)) or tokenizer.eos_ids[:1],
        eos=tokenizer.eos_ids,
    )
    for name in ("open", "close"):
        if not getattr(tokens, name):
            raise ConfigError(
                f"template.{name} is {getattr(template, name)!r}, which this tokenizer turns into no token: "
                "give a tag it can encode"
            )
    return tokens


def check_lengths(tokens: TemplateTokens, config: Config, max_positions: int) -> None:
    """Check that the longest sequence fits into the context, and that the shortest document has a position to score.

    Raises:
      ConfigError: instruction, document, tags, thought and horizon need more than max_positions tokens, or a document
        of data.min_tokens has no token that can be scored.
    """
    data, rlp = config.data, config.rlp
    responding = config.algorithm in RESPONDING
    if responding and not tokens.end:
        raise ConfigError(
            f"template.end is {config.template.end!r} and the tokenizer has no end-of-text token: give the text that "
            "ends a response"
        )
    parts = {
        "instruction": len(tokens.context),
        "data.document_tokens": data.document_tokens,
        "opening tag": len(tokens.open),
        "rlp.thought_tokens": rlp.thought_tokens,
        "end of a response" if responding else "closing tag": len(tokens.end if responding else tokens.close),
        "rlp.horizon": rlp.horizon,
    }
    total = sum(parts.values())
    if total > max_positions:
        listed = " + ".join(f"{name} {count}" for name, count in parts.items())
        raise ConfigError(
            f"{listed} = {total} tokens, but the model's context holds {max_positions}: "
            "lower data.document_tokens or rlp.thought_tokens"
        )
    needed = tokens.first + rlp.horizon
    if data.min_tokens < needed:
        raise ConfigError(
            f"data.min_tokens is {data.min_tokens}, but with rlp.horizon {rlp.horizon} a document needs at least "
            f"{needed} tokens to have one to predict: raise data.min_tokens to {needed}"
        )
