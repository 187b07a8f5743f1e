"""The flags of the commands that are not a run's: argparse, with our messages."""

import argparse
from collections.abc import Sequence

from flatcl.utils.errors import UsageError
from flatcl.utils.registry import nearest


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UsageError`s, and for which `-` and `_` are equal in flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:
        words = [_flag_spelling(word) for word in argv]
        flags = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
        known = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        unknown = [flag for flag in flags if flag[2:] not in known]
        if unknown:
            raise UsageError(*(f"unknown flag: {flag}. {nearest(flag[2:], known)}" for flag in unknown))
        return super().parse_args(words)

    def error(self, message: str):
        raise UsageError(f"{message}. See {self.prog} --help.")


def _flag_spelling(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
