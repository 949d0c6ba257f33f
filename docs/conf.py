"""Sphinx's settings for these pages: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

from progscale import __version__  # noqa: E402

project = "progscale"
author = "the progscale authors"
project_copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "config_options",
    "command_line",
]
exclude_patterns = ["_extensions"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"progscale {release}"
html_static_path = ["_static"]
html_css_files = ["progscale.css"]
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_copy_source = False
html_show_sourcelink = False

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
# Lines without a lexer's approval are mistakes in the page.
highlight_language = "text"

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# `$ ` before a command is not part of it.
copybutton_prompt_text = "$ "
