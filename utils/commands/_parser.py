"""The flags of the commands that are not a run's: argparse, with our messages."""

import argparse
import difflib
import itertools
from collections.abc import Mapping, Sequence

from flatcl.utils.arguments import flags_of_runs
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import nearest


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UsageError`s, and for which `-` and `_` are equal in flags. `of_runs`: what to write
    for flags of `flatcl train`, where the command starts runs; `elsewhere`: for some flags, something else."""

    def __init__(self, of_runs: str = "", elsewhere: Mapping[str, str] = {}, **options):
        self.of_runs, self.elsewhere = of_runs, elsewhere
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:
        words = [_flag_spelling(word) for word in argv]
        flags = [word.partition("=")[0] for word in itertools.takewhile(lambda word: word != "--", words)]
        unknown = [flag for flag in flags if flag.startswith("--") and flag not in self._option_string_actions]
        known = [flag for action in self._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]
        known = [flag for flag in known if flag.startswith("--")]
        if unknown:
            raise UsageError(*(f"unknown flag: {flag}. {self._hint(flag, known)}" for flag in unknown))
        return super().parse_args(words)

    def _hint(self, flag: str, known: list[str]) -> str:
        if flag in self.elsewhere:
            return self.elsewhere[flag]
        if not self.of_runs:
            return nearest(flag, known)
        name, of_runs = flag.removeprefix("--"), flags_of_runs() - {"dry_run", "disable_log"}
        if name in of_runs:
            return f"It is a flag of each run: {self.of_runs.format(flag=flag)}."
        own = {other.removeprefix("--") for other in known}
        others = of_runs - own - {other.removeprefix("--") for other in self.elsewhere}
        best = difflib.get_close_matches(name, sorted(own | others), n=1)
        if best and best[0] in others:
            return f"Did you mean --{best[0]}, a flag of each run? Then {self.of_runs.format(flag=f'--{best[0]}')}."
        return nearest(flag, known, f"Choose from: {', '.join(known)}; flags of each run come after a separate --.")

    def error(self, message: str):
        raise UsageError(f"{message}. See {self.prog} --help.")


def _flag_spelling(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _joined(flag: str, key: str, values: Sequence[str]) -> str:
    return f"Write {key}={','.join(dict.fromkeys(values))}." if flag == "--where" else "Give it once."


def conditions(pairs: Sequence[str], flag: str = "--where", example: str = "model=er,derpp") -> dict[str, str]:
    """{key: value} of the words after a flag such as --where."""
    bad = [pair for pair in pairs if "=" not in pair]
    if bad:
        raise UsageError(*(f"{flag} expects key=value, got '{pair}'. Example: {flag} {example}." for pair in bad))
    found: dict[str, list[str]] = {}
    for key, _, value in (pair.partition("=") for pair in pairs):
        found.setdefault(key.replace("-", "_"), []).append(value)
    twice = {key: values for key, values in found.items() if len(values) > 1}
    if twice:
        raise UsageError(*(f"{flag} names {key} {len(values)} times. {_joined(flag, key, values)}"
                           for key, values in twice.items()))  # fmt: skip
    return {key: value for key, (value,) in found.items()}
