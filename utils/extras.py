"""Packages that only some users need: imported where they are used, and asked for before any work."""

from importlib.util import find_spec

from flatcl.utils.errors import UsageError


def require(package: str, extra: str, user: str) -> None:
    """Raises `UsageError` where a package is not installed. `user`: the flag or file that needs it."""
    try:
        is_there = find_spec(package) is not None
    except ValueError:  # a module of this name without a file
        is_there = False
    if not is_there:
        raise UsageError(
            f'{user} needs the package {package}, which is not installed. Install it: pip install "flatcl[{extra}]", '
            f"or in a clone: pip install {package}."
        )
