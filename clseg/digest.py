"""Short hashes: of parameters, and of the code that decides numbers."""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
# What no digest of code covers. What settings say is among the parameters of a run; what reading and preparing make of
# files is known by its content (`Store.content`); charts, statistics, lessons and messages come after the numbers.
NOT_DECIDING = {
    *("clseg", "clseg.settings", "clseg.errors", "clseg.paths", "clseg.digest", "clseg.plots", "clseg.stats"),
    *("clseg.teach", "clseg.probe", "clseg.data", "clseg.data.formats", "clseg.data.volume", "clseg.data.phantom"),
    *("clseg.data.prepare", "clseg.stages", "clseg.recipes"),
}


def digest(tree: Any) -> str:
    """A short hash of a JSON-able tree; equal trees, equal hash."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:10]


def code_digest(modules: Iterable[str]) -> str:
    """A short hash of these modules of the package and of all they import of it, but `NOT_DECIDING`.

    It is of the parsed code: comments, docstrings and layout do not count. A new stage, recipe or chart leaves the
    digest of what does not import it as it was.
    """
    found, todo = {}, [*modules]
    while todo:
        if (name := todo.pop()) not in found and name not in NOT_DECIDING:
            found[name], imports = _parsed(name)
            todo += imports
    return digest(sorted(found.items()))


def package_digest() -> str:
    """A short hash of every file of the package: of what was imported, should the files change now."""
    files = sorted(PACKAGE.rglob("*.py"))
    return digest([[path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")] for path in files])


def imported(tree: ast.AST) -> set[str]:
    """The modules of the package that a parsed module imports anywhere in it, by their whole names."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "clseg":
            both = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            names |= {name for name in both if _path(name).is_file() or name == "clseg"}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "clseg"}
    return names


def _path(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _parsed(module: str) -> tuple[str, set[str]]:
    tree = ast.parse(_path(module).read_text(encoding="utf-8"))
    imports = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (
                node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
            )
            node.body = node.body[docstring:] or [ast.Pass()]
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest(), imports


def _plain(node: Any) -> Any:
    """A parsed tree as nested tuples; the same in every version of Python, unlike `ast.dump`."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return (type(node).__name__, *((name, _plain(value)) for name, value in fields))
    return tuple(map(_plain, node)) if isinstance(node, list) else repr(node)
