# SPDX-License-Identifier: Apache-2.0
"""Sphinx: `sphinx-build -W --keep-going docs docs/_build`. Neither building nor reading asks anything of a network."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

project = "rlp_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "generated"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rlp_jax"
html_show_copyright = False
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"  # docstrings quote names with single backquotes
linkcheck_timeout = 10


def setup(app):
    def bars(app, what, name, obj, options, lines):
        lines[:] = [line.replace("|c|", "\\|c\\|") for line in lines]  # else a substitution of reStructuredText

    app.connect("autodoc-process-docstring", bars)
