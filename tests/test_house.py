"""The house's rules (who imports whom, who may use torch, who opens the test split), and the project's own files."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from meml_lib.pipeline import reach

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "meml_lib"
ORDER = ("schema", "config", "runs", "tasks", "experts", "analysis", "rollouts", "training", "pipeline", "cli")
WITH_TORCH = ("rollouts", "training")
OPENS_TEST = {"training/evaluate.py"}
FILES = sorted(LIBRARY.rglob("*.py"))


def place(file: Path) -> str:
    return file.relative_to(LIBRARY).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(LIBRARY)))
def test_a_module_imports_only_from_its_own_place_and_those_above(file):
    own, source = place(file), file.read_text()
    assert "import meml_lib" not in source  # `from meml_lib import ..` says what is used
    package = ".".join(("meml_lib", *file.relative_to(LIBRARY).parent.parts))
    used = {path.split(".")[1] for paths in reach.imports(ast.parse(source).body, package).values() for path in paths}
    if own == "__init__":
        assert not used
        return
    assert own in ORDER and used <= set(ORDER[: ORDER.index(own) + 1])


def imported_packages(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) and not node.level else set()
    return {name.split(".")[0] for name in names}


def test_torch_stays_in_rollouts_and_training():
    for file in FILES:
        torch = imported_packages(file) & {"torch", "transformers", "accelerate", "peft"}
        assert place(file) in WITH_TORCH or not torch, file


def test_only_evaluation_opens_the_test_split():
    for file in FILES:
        name = str(file.relative_to(LIBRARY))
        if place(file) == "tasks" or name in OPENS_TEST:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "questions":
                split = node.args[0]
                given = name == "experts/__init__.py" and isinstance(split, ast.Name)  # by its caller, below
                assert given or split.value in ("train", "validation"), f"{name}:{node.lineno}"
            assert place(file) in ("tasks", "experts") or getattr(node, "attr", None) != "every_question", name
            if place(file) == "training" and isinstance(node, ast.Call) and "teacher_answers" in ast.unparse(node.func):
                assert "test" not in ast.unparse(node), f"{name}:{node.lineno}"


def test_no_bare_except():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{file}:{node.lineno}"


# --- project files ----------------------------------------------------------------------------------------------------


def requirement(text: str) -> str:
    return re.split(r"[ <>=!~\[;]", text.strip())[0].lower().replace("_", "-")


def test_every_dependency_is_pinned_and_every_third_party_import_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # exact, and no +cpu build
    pinned = {requirement(line) for line in lines}
    assert {requirement(line) for line in wanted} <= pinned
    roots = set().union(*map(imported_packages, FILES))
    known_as = {"yaml": "pyyaml", "PIL": "pillow", "markdown_it": "markdown-it-py"}
    roots -= {*sys.stdlib_module_names, "meml_lib", "vllm", "triton"}  # of `make vllm`; of torch on CUDA
    assert {requirement(known_as.get(name, name)) for name in roots} <= {requirement(line) for line in wanted}


def test_environment_yml_installs_the_project_itself_at_the_pinned_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, compiler, pip, lists = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert python == f"python{project['requires-python']}" and (compiler, pip) == ("c-compiler", "pip")
    extras = ",".join(project["optional-dependencies"])
    assert lists["pip"] == ["--constraint constraints.txt", f"--editable .[{extras}]"]


def test_package_data_holds_what_the_library_reads():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    data = {f for f in LIBRARY.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
    assert data and all(any(file.match(pattern) for pattern in patterns) for file in data)
