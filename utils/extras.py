"""Packages that only some users need: imported where they are used, and asked for before any work."""

from importlib.util import find_spec

from flatcl.utils.errors import UsageError


def require(module: str, extra: str, user: str, package: str | None = None, otherwise: str = "") -> None:
    """Raises `UsageError` where a module is not installed.

    `user`: the flag or file that needs it. `package`: its name for pip, if that is not the module's. `otherwise`: what
    can be done without it, such as "or write JSON".
    """
    try:
        is_there = find_spec(module) is not None
    except ValueError:  # a module of this name without a file
        is_there = False
    if not is_there:
        package = package or module
        raise UsageError(
            f'{user} needs the package {package}, which is not installed. Install it: pip install "flatcl[{extra}]", '
            f"or in a clone: pip install {package}{otherwise and f', {otherwise}'}."
        )
