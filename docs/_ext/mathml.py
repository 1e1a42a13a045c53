# SPDX-License-Identifier: Apache-2.0
"""Formulae as MathML, which browsers draw themselves: no script, no font and no request."""

from docutils import nodes
from latex2mathml.converter import convert


def _inline(translator, node):
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(translator, node):
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app):
    app.registry.html_inline_math_renderers["mathml"] = (_inline, None)
    app.registry.html_block_math_renderers["mathml"] = (_block, None)
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True}
