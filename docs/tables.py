"""Makes the tables of the pages anew, from the records and the registries: `python -m docs.tables`.

A table stands below the command that makes it, `<!-- flatcl report tests/records/mnistmlp ... -->`, and ends before
`<!-- end -->`. What is between the two is replaced by what the command prints; all else is left alone. Output that does
not begin with a table is put into a code block.
"""

import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path

from flatcl.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TABLE = re.compile(r"(<!-- flatcl ([^\n]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text of a page with all of its tables made anew. Paths in their commands begin at the repository's root,
    which must be the working directory."""
    return TABLE.sub(lambda found: f"{found[1]}\n{_output(found[2])}\n\n{found[3]}", text)


def _output(command: str) -> str:
    printed, called = io.StringIO(), sys.argv
    sys.argv = ["flatcl"]  # as which a usage line calls the program
    try:
        with contextlib.redirect_stdout(printed):
            code = main(shlex.split(command))
    finally:
        sys.argv = called
    if code != 0:
        raise SystemExit(f"flatcl {command}: it ended with {code}. Correct the command in the page.")
    text = printed.getvalue().strip()
    return text if text.startswith("|") else f"```text\n{text}\n```"


if __name__ == "__main__":
    os.chdir(ROOT)
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")
