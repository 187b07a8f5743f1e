"""Adds the page of all recorded runs, records.html, to the site: a hook of mkdocs.

The page is made when the site is built: it is too large to be kept beside the records that it is made of. Where the
pages are read without the site, there is no link to it.
"""

import contextlib
import io
import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from flatcl.utils.commands import report

RECORDS = Path(__file__).resolve().parent.parent / "tests/records"
NAME = "records.html"
LINK = re.compile(r"<!-- in the site: (\S+) (.+?) -->")  # of a page's source


def made() -> str:
    """The page, from the command that a user would type."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / NAME
        code = report.main([str(RECORDS), "--html", str(file)])
        if code != 0:
            raise SystemExit(f"flatcl report {RECORDS} --html: it ended with {code}.")
        return file.read_text(encoding="utf-8")


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, NAME, content=made()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return LINK.sub(r"[\2](\1)", markdown)
