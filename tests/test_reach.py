"""What code reaches: an edit counts exactly where it can change something, and nothing that runs is left out."""

from __future__ import annotations

import ast
import sys
from inspect import CO_OPTIMIZED
from pathlib import Path

import pytest

from meml_lib import config, runs, tasks
from meml_lib.pipeline import keys, reach


def test_comments_docstrings_and_layout_are_no_change_and_code_is():
    one = '"""Doc."""\nclass A:\n    """Doc."""\n    x: int = 1\n    """Of x."""\n\ndef f(a):  # why\n    return a + 1\n'
    same = "class A:\n    x: int = 1\ndef f(\n    a,\n): return (a + 1)"
    assert reach.normalised(one) == reach.normalised(same)
    assert reach.normalised(one) != reach.normalised(one.replace("a + 1", "a - 1"))
    assert reach.normalised("def f():\n    'doc'") == reach.normalised("def f(): pass")


def test_imports_are_found_at_the_top_in_functions_and_relative():
    source = "from meml_lib import runs\ndef f():\n  from ..tasks import gsm8k as g\n  import meml_lib.analysis.stats, os\n"
    assert reach.imports(ast.parse(source).body, "meml_lib.training") == {
        "runs": {"meml_lib.runs"},
        "g": {"meml_lib.tasks.gsm8k"},
        "meml_lib": {"meml_lib"},
    }


LIBRARY = {
    "__init__.py": "",
    "losses.py": "SCALE = 2.0\n_n = 1\n\ndef used(x):\n    return SCALE * helper(x)\n\ndef helper(x):\n    return x\n\n"
    "def other(x):\n    return -x\n",
    "shapes.py": "class Shape:\n    def area(self):\n        return far()\n\ndef far():\n    return 3\n\ndef near():\n    return 1\n",
    "world/__init__.py": "from meml_lib.world.deep import Deep\n\ndef load(name):\n    if name == 'deep':\n"
    "        from meml_lib.world.deep import Deep as world\n    else:\n        from meml_lib.world.flat import Flat as world\n"
    "    return world\n",
    "world/deep.py": "class Deep:\n    pass\n",
    "world/flat.py": "import os\n\nos.environ['FLAT'] = '1'\n\nclass Flat:\n    pass\n",
    "page.py": "def page():\n    return open('page.html')\n\ndef blank():\n    return ''\n",
    "page.html": "<p>",
    "same.py": "def run(x):\n    return x\n\ndef ours():\n    return run(1)\n\n"
    "def theirs():\n    from meml_lib.world.flat import Flat as run\n    return run\n",
    "loads.py": "import meml_lib.world.flat\n\ndef f():\n    return 1\n",
    "table.py": "TABLE = {}\n\ndef register(f):\n    TABLE[f.__name__] = f\n    return f\n\n"
    "@register\ndef one():\n    return 1\n\n"
    "def go(name):\n    return TABLE[name]()\n\ndef off():\n    return 0\n",
    "found.py": "def f():\n    return globals()['g']()\n\ndef g():\n    return 1\n",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small package in meml_lib's place. library(file, old, new) edits it."""
    for name, text in LIBRARY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(reach, "PACKAGE", tmp_path)

    def edit(name: str, old: str, new: str) -> None:
        assert old in LIBRARY[name]
        (tmp_path / name).write_text(LIBRARY[name].replace(old, new))

    return edit


@pytest.mark.parametrize(
    ("source", "places"),
    [
        ("from meml_lib import losses\nlosses.used(1)", "losses.py: SCALE, losses.py: helper, losses.py: used"),
        ("from meml_lib.losses import other as o\no(1)", "losses.py: other"),
        ("import meml_lib.losses\nmeml_lib.losses.other(1)", "losses.py: other"),
        ("import meml_lib.losses as x\nf = x.helper", "losses.py: helper"),
        ("from meml_lib import losses\n'losses.used'", ""),
        ("from meml_lib import shapes\nshapes.Shape().area", "shapes.py: Shape, shapes.py: far"),
        ("from meml_lib import world\nworld.Deep", "world/deep.py: Deep"),
        ("from meml_lib.page import page\npage", "page.html, page.py: page"),
        ("from meml_lib.page import blank\nblank", "page.py: blank"),
        ("import os\nos.getcwd()", ""),
        ("import meml_lib.world.flat", "world/flat.py"),
        ("from meml_lib.loads import f\nf()", "loads.py: f, world/flat.py"),
        ("from meml_lib.table import go\ngo", "table.py, table.py: TABLE, table.py: go, table.py: register"),
        ("from meml_lib.found import f\nf()", "found.py: f, found.py: g"),
    ],
)
def test_code_reaches_what_it_names(library, source, places):
    assert ", ".join(reach.code_of(source)) == places


def test_a_module_handed_on_as_a_value_counts_whole(library):
    names = ("SCALE", "_n", "helper", "other", "used")
    assert [*reach.code_of("from meml_lib import losses\ngetattr(losses, x)")] == [f"losses.py: {name}" for name in names]


def test_every_import_of_a_name_counts_and_what_a_module_does_when_loaded(library):
    places = ["world/__init__.py: load", "world/deep.py: Deep", "world/flat.py", "world/flat.py: Flat"]
    source = "from meml_lib import world\nworld.load('deep')"
    assert [*reach.code_of(source)] == places
    assert [*reach.code_of(source, {"meml_lib.world.flat"})] == places[:2]
    assert [*reach.code_of(source, {"meml_lib.world.flat.Flat"})] == places[:2]


def test_what_its_decorator_may_have_put_in_a_table_counts_and_its_neighbours_do_not(library):
    source = "from meml_lib import table\ntable.go('one')"
    before = reach.code_of(source)
    library("table.py", "return 0", "return 2")
    assert reach.code_of(source) == before
    library("table.py", "    return 1", "    return 11")
    assert keys.reasons({"code": before}, {"code": reach.code_of(source)}) == ["table.py changed"]


def test_a_name_that_is_defined_here_and_imported_by_a_function_stands_for_both(library):
    assert "same.py: run" in reach.code_of("from meml_lib import same\nsame.ours()")
    assert "same.py: run" in reach.code_of("from meml_lib.same import run\nrun(1)")


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (("losses.py", "return x", "return x + 1"), ["losses.py: helper"]),
        (("losses.py", "2.0", "3.0"), ["losses.py: SCALE"]),
        (("losses.py", "return -x", "return x"), []),
        (("losses.py", "    return x", "    # why\n    return (x)"), []),
        (("page.html", "<p>", "<div>"), ["page.html"]),
    ],
)
def test_an_edit_changes_the_definition_that_it_stands_in(library, edit, changed):
    source = "from meml_lib import losses, page\nlosses.used(page.page)"
    before = reach.code_of(source)
    library(*edit)
    assert keys.reasons({"code": before}, {"code": reach.code_of(source)}) == [f"{place} changed" for place in changed]


def test_all_that_runs_while_a_stage_trains_is_in_its_key(tmp_path):
    """The other side of naming less: whatever ran, by Python's own account, must have been reached."""
    from meml_lib.training import stage

    p = config.load_run("params/smoke.yaml", {"mef.steps": 2, "riel.steps": 2}, run_dir=tmp_path)
    tasks.load(p.task)  # loads modules, whose own lines define and do not run
    for name in ("mef", "riel"):
        ran: set[tuple[str, int]] = set()

        def note(frame, event, argument, ran=ran):
            code = frame.f_code  # a function's, not that of a module or class that is being loaded
            if event == "call" and code.co_flags & CO_OPTIMIZED and code.co_filename.startswith(f"{reach.PACKAGE}/"):
                ran.add((code.co_filename, code.co_firstlineno))

        sys.setprofile(note)
        try:
            stage.run(name, p)
        finally:
            sys.setprofile(None)
        code = keys.stage_parts(name, p)["code"]
        skipped = ("config.py", "schema.py")  # their values are in the key
        places = {place for file, line in ran if (place := _definition(Path(file), line)).split(":")[0] not in skipped}
        assert "training/losses.py: weighted_nll" in places and len(places) > 40
        assert places <= code.keys(), places - code.keys()
    assert runs.RunFolder(p.folder("riel")).read_metrics()["rows/buffer_sft"].sum() > 0  # its code ran too


def _definition(file: Path, line: int) -> str:
    """The top-level definition that a line stands in."""
    for statement in ast.parse(file.read_text()).body:
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        if first <= line <= statement.end_lineno:
            place, name = file.relative_to(reach.PACKAGE), next(reach._defined(statement))
            return str(place) if name == reach._REST else f"{place}: {name}"
    raise AssertionError(f"{file}:{line}")
