"""What can be chosen: `flatcl list [models|datasets|backbones|optimizers|policies]`, also `python main.py --list`."""

from collections.abc import Sequence

from flatcl.utils.commands._parser import Parser
from flatcl.utils.console import shown
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import BACKBONES, DATASETS, METHODS, OPTIMIZERS, POLICIES, load_plugin, nearest

KINDS = {
    "models": METHODS, "datasets": DATASETS, "backbones": BACKBONES, "optimizers": OPTIMIZERS, "policies": POLICIES
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="flatcl list", description="What can be chosen, one line each.")
    parser.add_argument("what", nargs="?", default="", help=f"{', '.join(KINDS)}; default: all")
    parser.add_argument("--plugin", action="append", default=[], help="a file that adds names (repeatable)")
    args = parser.parse_args(argv)
    return shown(lambda: show(args.what, args.plugin))


def show(what: str, plugins: Sequence[str]) -> None:
    """Prints the registries, or one of them, without importing what is in them."""
    for plugin in plugins:
        load_plugin(plugin)
    wanted = what.replace("-", "_")
    if wanted and wanted not in KINDS:
        raise UsageError(f"there is no list of '{what}'. {nearest(wanted, list(KINDS))}")
    if wanted == "optimizers":
        print(_optimizer_table())
        return
    for kind, registry in KINDS.items():
        if wanted in ("", kind):
            print(f"{kind}:")
            for name in registry.choices():
                print(f"  {name:18} {registry.summary(name)}")


def _optimizer_table() -> str:
    """Each optimizer's costs beside its paper, as its file states them."""
    registry = OPTIMIZERS
    rows = [("name", "passes a step", "extra memory", "paper")]
    for name in registry.names():
        rows.append((name, registry.note(name, "Passes"), registry.note(name, "Memory"), registry.summary(name)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["optimizers:"]
    lines += ["  " + "  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    lines.append("\nP: one number for each parameter. A backward pass takes about as long as two forward passes.")
    return "\n".join(lines)
