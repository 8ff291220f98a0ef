"""Imports go one way, those within functions and those for types alone counted."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "pipeline", "strategies")


@cache
def trees() -> dict[str, ast.Module]:
    """File -> what is in it."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False)


def test_no_module_imports_itself_by_others(graph: grimp.ImportGraph) -> None:
    """What nobody on a circle imports, and what imports nobody on one, is taken away until nothing or the circles are left."""
    left = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    while ends := {module for module, imported in left.items() if not imported & left.keys()}:
        left = {module: imported for module, imported in left.items() if module not in ends}
    importers = {imported for found in left.values() for imported in found}
    assert not {module: sorted(found & left.keys()) for module, found in left.items() if module in importers}


def test_folders_do_not_import_each_other(graph: grimp.ImportGraph) -> None:
    def folder(module: str) -> str:
        return ".".join(module.split(".")[:2])

    pairs = {
        (folder(module), folder(imported))
        for module in graph.modules - set(PACKAGES)
        for imported in graph.find_modules_directly_imported_by(module) - set(PACKAGES)
    }
    assert not {(one, other) for one, other in pairs if one < other and (other, one) in pairs}


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
LATER = ("pipeline/cli/", "pipeline/demo/")
BY_TABLE = {"strategies/lazy.py", "strategies/losses/table.py", "pipeline/tracking/dispatcher.py"}
"""Import what a table of names says: exported names, losses, trackers."""
BY_VARIABLE = {
    "cluster/local_workers/fork_server.py",
    "strategies/memory/measure.py",
    "strategies/plugins.py",
    "strategies/rewards.py",
}
"""Import what they are told."""


def calls(tree: ast.AST, *functions: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in functions:
            yield node


def own_imports(tree: ast.AST) -> Iterator[int]:
    """Lines that import a module of ours."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [PACKAGES[0] if node.level else node.module or ""]
        if any(name.partition(".")[0] in PACKAGES for name in names):
            yield node.lineno


def late_imports(tree: ast.Module) -> set[int]:
    return {line for node in ast.walk(tree) if isinstance(node, FUNCTIONS) for line in own_imports(node)}


def test_own_modules_are_imported_at_the_top() -> None:
    """Commands, the demo and what packages export by name start faster for theirs."""
    files = {name: tree for name, tree in trees().items() if not name.endswith("__init__.py") and not name.startswith(LATER)}
    assert {name: lines for name, tree in files.items() if (lines := late_imports(tree))} == {}


def test_modules_are_imported_by_name_in_few_places() -> None:
    """Where the name is a literal, an import says it."""
    found = {name: list(calls(tree, "import_module", "__import__")) for name, tree in trees().items()}
    assert {name for name, nodes in found.items() if nodes} == BY_TABLE | BY_VARIABLE
    assert all(isinstance(node.args[0], ast.Name) for name in BY_VARIABLE for node in found[name])


def test_late_imports_are_found() -> None:
    for line in ("from .retry import x", "import json, pipeline.errors", "from strategies import models"):
        assert late_imports(ast.parse(f"async def f():\n    {line}")) == {2}
    assert late_imports(ast.parse("import pipeline.errors\ndef f():\n    import pipelines")) == set()


COMPAT = {"cluster/ray_compat.py", "strategies/compat.py"}
TRAINERS = ("strategies/trainers/", "strategies/mixins/")
HOOKS = ast.get_docstring(ast.parse((ROOT / "strategies/trainers/__init__.py").read_text())) or ""
USED_BY_TRAINERS = set(re.findall(r"\b_\w+", HOOKS.partition("Private names of theirs")[2]))
"""Of their base classes; `tests/strategies/test_hooks.py` compares them with what is there."""
OTHERS = {"os._exit", "hashlib._Hash"}
"""The one is public, the other has no public name and is used as a type alone."""


def own_names(tree: ast.AST) -> Iterator[str]:
    """Functions, classes, variables, and attributes that methods set on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def dotted_names(tree: ast.AST) -> Iterator[str]:
    """Imported names, attributes, and the literals that `getattr` and the like take."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
    for call in calls(tree, "getattr", "setattr", "hasattr", "delattr", "attrgetter", "import_module", "__import__"):
        yield from (one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str))


def private_parts(name: str) -> set[str]:
    return set(re.findall(r"(?:^|\.)(_[a-zA-Z]\w*)", name))


def foreign_names(trees: dict[str, ast.Module]) -> list[str]:
    """Names with a private part that nothing of ours defines, so that it is a library's, as are those of `super()`.

    But trainers may use the listed names of their base classes.
    """
    in_trainers = {name for file, tree in trees.items() if file.startswith(TRAINERS) for name in own_names(tree)}
    elsewhere = {name for file, tree in trees.items() if not file.startswith(TRAINERS) for name in own_names(tree)}
    ours = elsewhere | (in_trainers - USED_BY_TRAINERS)  # which set some of them
    ours |= {Path(part).stem for name in trees for part in Path(name).parts}
    found = []
    for file, tree in trees.items():
        is_trainer = file.startswith(TRAINERS)
        known = ours | USED_BY_TRAINERS if is_trainer else ours
        for name in dotted_names(tree) if file not in COMPAT else ():
            inherits = re.match(r"super\(\)\._[a-z]", name) and not is_trainer
            if name not in OTHERS and (inherits or private_parts(name) - known):
                found.append(f"{file}: {name}")
    return found


def test_private_names_of_libraries_stand_in_one_module_per_package() -> None:
    assert foreign_names(trees()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import ray as r\nr._private.worker",
        "from ray import train\ntrain._internal",
        "from ray._private.state import state",
        "import ray._private.state",
        "from ray.util import _hidden",
        'getattr(ray, "_private")',
        'importlib.import_module("ray._private.state")',
        "trainer.accelerator.state._mixed_precision",
        "config._attn_implementation = 'eager'",
        "class Ours(Theirs):\n    def _hook(self):\n        super()._hook()",
    ],
)
def test_a_librarys_private_name_is_found(source: str) -> None:
    assert foreign_names({"pipeline/ours.py": ast.parse(source)})


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.partition(".")[0] for name in names}


def test_what_is_imported_is_declared() -> None:
    """A package that another one happens to bring may be gone with its next version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["trackers"]]
    names = {re.split(r"[\[<>=]", one)[0].lower().replace("_", "-") for one in declared}
    distributions = packages_distributions()
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    third = {name for path in files for name in imported(path)} - sys.stdlib_module_names - set(PACKAGES)
    missing = {name for name in third if not {one.lower().replace("_", "-") for one in distributions.get(name, [])} & names}
    assert missing == {"IPython", "pydantic_core"}  # the one runs the notebook that imports it, the other is pydantic's half


def defined(module: str) -> set[str]:
    """Names that a module's own code defines or imports at its top."""
    path = ROOT / (module.replace(".", "/") + ".py")
    tree = ast.parse((path if path.exists() else path.with_suffix("") / "__init__.py").read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    targets = [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    targets += [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return names | {target.id for target in targets if isinstance(target, ast.Name)}


def test_lazy_names_are_there() -> None:
    """Without importing them."""
    tables = [
        ast.literal_eval(node.args[1])
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "lazy_names"
    ]
    assert len(tables) > 10
    assert [
        (module, name) for table in tables for module, names in table.items() for name in set(names.split()) - defined(module)
    ] == []


def test_nothing_but_a_strategy_asks_for_its_name() -> None:
    """`cfg.rl == "dpo"`, also by `in`; what depends on a strategy is an attribute or a method of its class."""
    found = []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and not name.startswith("strategies/methods/"):
                sides = (node.left, *node.comparators)
                parts = [part for side in sides for part in ast.walk(side)]
                has_name = any(isinstance(side, ast.Attribute) and side.attr == "rl" for side in sides)
                if has_name and any(isinstance(part, ast.Constant) for part in parts):
                    found.append(f"{name}:{node.lineno}")
    assert found == []


def test_configs_have_a_type_in_pipeline() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if name.startswith("pipeline/")
        and isinstance(node, ast.arg | ast.AnnAssign)
        and node.annotation is not None
        and ast.unparse(node).startswith("cfg: Any")
    ]
    assert found == []


@pytest.mark.parametrize("package", ["pipeline", "strategies"])
def test_the_picture_of_the_floors_is_that_of_the_contracts(package: str) -> None:
    """The same names on the same floors in CONTRIBUTING.md, top down, each with what it is for."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == [package])
    picture = (ROOT / "CONTRIBUTING.md").read_text().partition(f"\n{package}\n")[2].partition("\n---")[0]
    assert re.findall(r"^  (\S+(?: \| \S+)*)  +\S", picture, flags=re.MULTILINE) == layers
    assert len(picture.splitlines()) == len(layers)
