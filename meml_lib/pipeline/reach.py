"""The code of meml_lib that other code reaches, definition by definition: what an edit makes stale.

A definition is a function, a class or an assigned name at the top of a module; it reaches what its code names. In doubt
more counts, never less: a class counts whole, so does a module that is handed on as a value, and a name counts wherever
it stands. A file beside the module that it names in a text (a template) counts too.
"""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from meml_lib import runs

PACKAGE = Path(__file__).resolve().parents[1]
_OURS = "meml_lib"
_REST = "*"
"""Stands for a module's statements that define nothing; they count wherever the module is loaded."""


def code_of(source: str, skip: Container[str] = ()) -> dict[str, str]:
    """What a piece of code reaches: `training/losses.py: mutual_loss` -> hash of that definition.

    Comments, layout, docstrings and documented fields do not count.

    Args: skip: modules (`meml_lib.config`) and definitions (`meml_lib.cli.run`) that are not followed.
    """
    body = ast.parse(source).body
    found: dict[str, str] = {}
    waiting, followed = _loads(body, _OURS, _OURS) | set(_named(body, imports(body))), set()
    while waiting:
        followed.add(path := waiting.pop())
        for module, name in _at(path):
            if module.name in skip or f"{module.name}.{name}" in skip:
                continue
            waiting |= module.loads - followed
            if name in module.statements:
                found[module.place if name == _REST else f"{module.place}: {name}"] = module.hashed(name)
                found |= {str(file.relative_to(PACKAGE)): runs.hash_file(file) for file in module.files(name)}
                waiting |= module.named(name) - followed
    return dict(sorted(found.items()))


def normalised(source: str) -> str:
    """Code without comments, layout, docstrings and documented fields: what decides its results."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return ast.unparse(tree)


class _Module:
    """A module's definitions, what each is made of and what it names."""

    def __init__(self, name: str, file: Path):
        self.name, self.place, self._folder = name, str(file.relative_to(PACKAGE)), file.parent
        self._package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        body = ast.parse(file.read_text(encoding="utf-8")).body
        self.imports = imports(body, self._package)
        self.loads = _loads(body, name, self._package)
        self.statements: dict[str, list[ast.stmt]] = {}
        ours = {defined for statement in body for defined in _defined(statement)} | {*self.imports}
        for statement in body:
            decorated = (node for part in getattr(statement, "decorator_list", []) for node in ast.walk(part))
            registered = any(isinstance(node, ast.Name) and node.id in ours for node in decorated)
            for defined in (*_defined(statement), *[_REST] * registered):  # others may find it without its name
                self.statements.setdefault(defined, []).append(statement)
        self.hashed, self.named, self.files = cache(self._hashed), cache(self._named), cache(self._files)

    def _hashed(self, name: str) -> str:
        own = normalised("\n".join(map(ast.unparse, self.statements[name])))
        return hashlib.sha256(own.encode()).hexdigest()[:16]

    def _named(self, name: str) -> set[str]:
        own = self.statements[name]
        paths = {"globals": {self.name}} | {other: {f"{self.name}.{other}"} for other in self.statements}
        for other, imported in self.imports.items():  # beside: a function may import by a name defined here
            paths[other] = paths.get(other, set()) | imported
        return set(_named(own, paths))

    def _files(self, name: str) -> list[Path]:
        nodes = (node for statement in self.statements[name] for node in ast.walk(statement))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        beside = {file.name: file for file in self._folder.iterdir() if file.is_file()}
        return [file for text, file in beside.items() if text in texts]


@cache
def _read(name: str, file: Path, mtime: int, size: int) -> _Module:
    return _Module(name, file)


def _file(module: str) -> Path | None:
    first, *others = module.split(".")
    path = PACKAGE.joinpath(*others)
    places = (path / "__init__.py", path.with_suffix(".py"))
    return next((place for place in places if first == _OURS and place.is_file()), None)


def _at(path: str) -> Iterator[tuple[_Module, str]]:
    """The (module, definition) that a dotted path means: all of a module's where the path names none of them."""
    parts = path.split(".")
    found = ((length, _file(".".join(parts[:length]))) for length in range(len(parts), 0, -1))
    length, file = next((place for place in found if place[1]), (0, None))
    if file is None:
        return
    changed = file.stat()
    module = _read(".".join(parts[:length]), file, changed.st_mtime_ns, changed.st_size)
    first, *others = parts[length:] or [None]
    if first in module.imports:  # imported there, defined elsewhere
        for source in module.imports[first]:
            yield from _at(".".join([source, *others]))
    if first in module.statements or first == _REST:
        yield module, first
    elif first not in module.imports:
        yield from ((module, name) for name in module.statements)


def _defined(statement: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement defines; `_REST` where it does something else."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield statement.name
        case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            parts = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            yield from [part.id for part in parts if isinstance(part.ctx, ast.Store)] or [_REST]
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()) | ast.If(test=ast.Name("TYPE_CHECKING")):
            pass
        case _:
            yield _REST


def _loads(body: list[ast.stmt], module: str, package: str) -> set[str]:
    """Dotted paths of what runs while a module is loaded: its own statements, those of its packages and its imports."""
    paths = {module}.union(*imports([part for part in body if isinstance(part, ast.ImportFrom)], package).values())
    paths |= {alias.name for part in body if isinstance(part, ast.Import) for alias in part.names}
    parts = [path.split(".") for path in paths]
    above = {".".join(own[:length]) for own in parts for length in range(1, len(own) + 1)}
    return {f"{name}.{_REST}" for name in above if _file(name)}


def imports(statements: Iterable[ast.stmt], package: str = _OURS) -> dict[str, set[str]]:
    """Name -> dotted paths of what these statements import from meml_lib as it, at their top or inside functions."""
    found = defaultdict(set)
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            for alias in node.names:  # `import a.b` binds a
                path = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or path].add(path)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            for alias in node.names:
                found[alias.asname or alias.name].add(".".join([*above, *filter(None, [node.module]), alias.name]))
    ours = {name: {path for path in paths if path.split(".")[0] == _OURS} for name, paths in found.items()}
    return {name: paths for name, paths in ours.items() if paths}


def _named(statements: Iterable[ast.stmt], paths: Mapping[str, set[str]]) -> Iterator[str]:
    """Dotted paths of all that these statements name; paths: name -> dotted paths of what it may stand for."""
    waiting: list[ast.AST] = list(statements)
    while waiting:
        start, chain = waiting.pop(), []
        while isinstance(start, ast.Attribute):
            chain.insert(0, start.attr)
            start = start.value
        if isinstance(start, ast.Name):
            yield from (".".join([path, *chain]) for path in paths.get(start.id, ()))
        waiting += ast.iter_child_nodes(start)
