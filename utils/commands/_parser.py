"""The flags of the commands that are not a run's: argparse, with our messages."""

import argparse
from collections.abc import Sequence

from flatcl.utils.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UsageError`s, and for which `-` and `_` are equal in flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:
        return super().parse_args([_flag_spelling(word) for word in argv])

    def error(self, message: str):
        raise UsageError(f"{message}. See {self.prog} --help.")


def _flag_spelling(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
