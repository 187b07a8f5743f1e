"""Imports point one way: commands -> contracts -> engine -> (by name) methods, benchmarks, optimizers ... -> utils."""

import ast
import importlib.util
import pkgutil
from graphlib import TopologicalSorter

import pytest

import flatcl

MODULES = ["flatcl", *(module.name for module in pkgutil.walk_packages(flatcl.__path__, "flatcl."))]
CHOSEN = ("flatcl.models", "flatcl.datasets", "flatcl.backbone", "flatcl.utils.optim")  # by name, when a run wants them
DRIVES_A_RUN = {"build", "checkpoint", "logs", "results", "run", "texts", "trainer"}  # of the engine


def imports(module, inside_functions=True):
    """The modules of ours that a module imports, whether at its top or in a function."""
    spec = importlib.util.find_spec(module)
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    with open(spec.origin, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relative to {package}"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name in MODULES} - {module}


def is_in(module, *packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def machinery(module):
    """Whether a file is what others are built on, and no name that a user chooses."""
    return module in CHOSEN or module.rpartition(".")[2].startswith("_")


def test_no_module_needs_itself():
    graph = {module: imports(module) for module in MODULES}
    assert sum(map(len, graph.values())) > 300
    packages = {module for module in MODULES if importlib.util.find_spec(module).submodule_search_locations}
    graph = {module: needed - packages for module, needed in graph.items() if module not in packages}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    needed = imports(module)
    if not is_in(module, "flatcl.utils.commands", "flatcl.__main__"):
        assert not [name for name in needed if is_in(name, "flatcl.utils.commands")]
    for part in ("flatcl.utils.contracts", "flatcl.utils.reports", "flatcl.utils.studies"):
        if not is_in(module, "flatcl.utils.commands", part):
            assert not [name for name in needed if is_in(name, part)]
    parts = tuple(f"flatcl.utils.{name}" for name in ("commands", "contracts", "engine", "reports", "studies"))
    if is_in(module, "flatcl.utils") and not is_in(module, *parts, *CHOSEN):
        assert not [name for name in needed if is_in(name, "flatcl.utils.engine", *CHOSEN)]
    if is_in(module, *parts):
        assert not [name for name in needed if is_in(name, *CHOSEN) and not machinery(name)]
    if is_in(module, *CHOSEN):
        drivers = {f"flatcl.utils.engine.{name}" for name in DRIVES_A_RUN}
        assert not needed & drivers
