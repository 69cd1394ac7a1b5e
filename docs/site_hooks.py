"""Hooks of the documentation site: the command-line reference, and formulas as MathML.

Both are made when the site is built, from what is installed. Readers need no script of a third party.
"""

import re
import subprocess
import sys
from html import unescape
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Append the reference that typer generates from the commands to ``cli.md``."""
    if page.file.src_uri == "cli.md":
        command = [sys.executable, "-m", "typer", "cascade.cli.main", "utils", "docs", "--name", "cascade"]
        reference = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        markdown += "\n" + reference.partition("\n")[2]  # without its title
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Convert the formulas that ``pymdownx.arithmatex`` has marked."""
    return FORMULA.sub(lambda m: convert(unescape(m[3]), display="inline" if m[2] == "(" else "block"), html)
