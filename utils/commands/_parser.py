"""The flags of the commands that are not a run's: argparse, with our messages."""

import argparse
import itertools
from collections.abc import Sequence

from flatcl.utils.errors import UsageError
from flatcl.utils.registry import nearest


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UsageError`s, and for which `-` and `_` are equal in flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:
        words = [_flag_spelling(word) for word in argv]
        flags = [word.partition("=")[0] for word in itertools.takewhile(lambda word: word != "--", words)]
        unknown = [flag for flag in flags if flag.startswith("--") and flag not in self._option_string_actions]
        known = [flag for action in self._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]
        known = [flag for flag in known if flag.startswith("--")]
        if unknown:
            raise UsageError(*(f"unknown flag: {flag}. {nearest(flag, known)}" for flag in unknown))
        return super().parse_args(words)

    def error(self, message: str):
        raise UsageError(f"{message}. See {self.prog} --help.")


def _flag_spelling(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
