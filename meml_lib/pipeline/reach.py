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
    waiting, followed = _loads(body, _OURS, _OURS), set()
    paths = imports(body)
    for statement in map(_Statement, body):
        waiting |= statement.named(paths)
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
        _drop_texts(node)
    return ast.unparse(tree)


def _drop_texts(node: ast.AST) -> None:
    body = getattr(node, "body", None)
    if isinstance(body, list):
        kept = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
        node.body = kept or [ast.Pass()]


class _Statement:
    """A statement without its docstrings: what it imports, names and says, found in one walk."""

    def __init__(self, node: ast.stmt):
        self.node, self.imports, self.texts = node, [], set()
        self._chains: set[tuple[str, ...]] = set()
        waiting: list[ast.AST] = [node]
        while waiting:
            start, chain = waiting.pop(), []
            while isinstance(start, ast.Attribute):
                chain.append(start.attr)
                start = start.value
            if isinstance(start, ast.Name):
                self._chains.add((start.id, *reversed(chain)))
            elif isinstance(start, ast.Constant):
                self.texts |= {start.value} if isinstance(start.value, str) else set()
            elif isinstance(start, ast.Import | ast.ImportFrom):
                self.imports.append(start)
            else:
                _drop_texts(start)
                waiting += ast.iter_child_nodes(start)

    def named(self, paths: Mapping[str, set[str]]) -> set[str]:
        """Dotted paths of all that it names; paths: name -> dotted paths of what it may stand for."""
        return {".".join([path, *chain]) for name, *chain in self._chains for path in paths.get(name, ())}


class _Module:
    """A module's definitions, what each is made of and what it names."""

    def __init__(self, name: str, file: Path):
        self.name, self.place = name, str(file.relative_to(PACKAGE))
        self._package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        body = ast.parse(file.read_text(encoding="utf-8")).body
        parts = [_Statement(node) for node in body]
        self.imports = _bound((node for part in parts for node in part.imports), self._package)
        self.loads = _loads(body, name, self._package)
        self.statements: dict[str, list[_Statement]] = {}
        self._beside = {beside.name: beside for beside in file.parent.iterdir() if beside.is_file()}
        ours = {defined for node in body for defined in _defined(node)} | {*self.imports}
        for part in parts:
            decorated = (node for top in getattr(part.node, "decorator_list", []) for node in ast.walk(top))
            registered = any(isinstance(node, ast.Name) and node.id in ours for node in decorated)
            for defined in (*_defined(part.node), *[_REST] * registered):  # others may find it without its name
                self.statements.setdefault(defined, []).append(part)
        self._paths = {"globals": {name}} | {other: {f"{name}.{other}"} for other in self.statements}
        for other, imported in self.imports.items():  # beside: a function may import by a name defined here
            self._paths[other] = self._paths.get(other, set()) | imported
        self.hashed, self.named = cache(self._hashed), cache(self._named)

    def _hashed(self, name: str) -> str:
        own = "\n".join(ast.unparse(part.node) for part in self.statements[name])
        return hashlib.sha256(own.encode()).hexdigest()[:16]

    def _named(self, name: str) -> set[str]:
        return set().union(*(part.named(self._paths) for part in self.statements[name]))

    def files(self, name: str) -> list[Path]:
        """Files beside the module that a definition names."""
        return [self._beside[text] for part in self.statements[name] for text in part.texts & self._beside.keys()]


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
    paths = {module}.union(*_bound((part for part in body if isinstance(part, ast.ImportFrom)), package).values())
    paths |= {alias.name for part in body if isinstance(part, ast.Import) for alias in part.names}
    parts = [path.split(".") for path in paths]
    above = {".".join(own[:length]) for own in parts for length in range(1, len(own) + 1)}
    return {f"{name}.{_REST}" for name in above if _file(name)}


def imports(statements: Iterable[ast.stmt], package: str = _OURS) -> dict[str, set[str]]:
    """Name -> dotted paths of what these statements import from meml_lib as it, at their top or inside functions."""
    return _bound((node for statement in statements for node in ast.walk(statement)), package)


def _bound(nodes: Iterable[ast.AST], package: str) -> dict[str, set[str]]:
    found = defaultdict(set)
    for node in nodes:
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
