"""The six notebooks: their form, and that each runs on the smoke preset in both of papermill's ways."""

import ast
import copy
import json
import os
import re
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from papermill.exceptions import PapermillExecutionError

from meml_lib import config, experts, tasks
from meml_lib.analysis import overlap
from meml_lib.pipeline import outputs
from meml_lib.runs import RunFolder

ROOT = Path(__file__).parents[1]
OF_RUN = ("00_experts", "01_error_overlap", "02_mef", "03_riel")
OF_STUDY = ("04_ablations", "05_report")
FILES = dict.fromkeys(OF_RUN, "params/smoke.yaml") | dict.fromkeys(OF_STUDY, "params/studies/smoke.yaml")


def path(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def code_cells(name: str) -> list:
    return [cell for cell in nbformat.read(path(name), as_version=4).cells if cell.cell_type == "code"]


# --- form -------------------------------------------------------------------------------------------------------------


def test_the_notebooks_are_the_six():
    assert sorted(file.stem for file in path("").parent.glob("*.ipynb")) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_it_is_a_plain_notebook_without_outputs(name):
    notebook = nbformat.read(path(name), as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5) and notebook.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert all(cell.execution_count is None and not cell.outputs for cell in code_cells(name))
    assert notebook.cells[0].source.startswith(f"# {name[:2]} · ")


@pytest.mark.parametrize("name", FILES)
def test_the_first_code_cell_holds_the_parameters_and_only_literals(name):
    first, *others = code_cells(name)
    assert first.metadata.tags == ["parameters"] and not any(cell.metadata.get("tags") for cell in others)
    nodes = ast.parse(first.source).body
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in nodes}
    places = ["run_dir", "stage1_dir"] if name in OF_RUN else ["reports_dir"]
    assert list(values) == ["params_file", "overrides", *places] and values["params_file"] == FILES[name]


@pytest.mark.parametrize("name", FILES)
def test_the_second_code_cell_checks_the_values_before_anything_else_is_loaded(name):
    made, call = ("p", "from_notebook") if name in OF_RUN else ("study", "study_from_notebook")
    expected = f"from meml_lib import config\n\n{made} = config.{call}(globals())\n{made}"
    assert code_cells(name)[1].source == expected


@pytest.mark.parametrize("name", FILES)
def test_a_cell_chooses_calls_or_shows_and_computes_nothing(name):
    work = (ast.ClassDef, ast.FunctionDef, ast.Lambda, ast.For, ast.While, ast.If, ast.IfExp, ast.Try, ast.With)
    work += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.BinOp)
    for cell in code_cells(name):
        found = [type(node).__name__ for node in ast.walk(ast.parse(cell.source)) if isinstance(node, work)]
        assert not found, cell.source


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> config.Study:
    """Where the notebooks' results go: one arm of the smoke study is run by 02 and 03, the other stays missing."""
    return config.load_study(ROOT / FILES["05_report"], reports_dir=tmp_path_factory.mktemp("reports"))


def execute(notebook: Path, parameters: dict, cwd: Path = ROOT) -> str:
    """All texts that the executed notebook shows."""
    done = notebook.with_name(f"{notebook.stem}-done.ipynb")
    papermill.execute_notebook(notebook, done, parameters, kernel_name="python3", cwd=cwd, progress_bar=False)
    assert done.stat().st_size < 5e6
    cells = nbformat.read(done, as_version=4).cells
    return json.dumps([cell.outputs for cell in cells if cell.cell_type == "code"])


def part(name: str, folder: Path, last: str = "") -> Path:
    """A copy of a notebook to run: whole, or up to the first cell that holds `last`."""
    notebook = nbformat.read(path(name), as_version=4)
    if last:
        place = next(n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code" and last in cell.source)
        notebook.cells = notebook.cells[: place + 1]
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def as_f(name: str) -> dict:
    """What `papermill -f FILE` hands over: the file's own sections."""
    return yaml.safe_load((ROOT / FILES[name]).read_text())


def test_00_keeps_the_teachers_answers(study, tmp_path):
    execute(part("00_experts", tmp_path), as_f("00_experts") | {"run_dir": str(study.base_run().run_dir)})
    answers = RunFolder(study.base_run().run_dir).read_table("teacher_answers")
    assert answers.groupby("expert").size().tolist() == [64, 64, 64]
    folder = RunFolder(study.base_run().run_dir)
    kept = {name: folder.read_table(name) for name in ("imported", "answer_quality", "shared_ngrams")}
    assert kept["imported"]["rows"].isna().all() and len(kept["shared_ngrams"]) == 3 * 2
    assert kept["answer_quality"].query("what == 'test_question'")["answers"].tolist() == [0, 0, 0]


def test_01_keeps_the_sets_of_errors(study, tmp_path):
    places = {"run_dir": str(study.base_run().run_dir)}
    shown = execute(part("01_error_overlap", tmp_path), as_f("01_error_overlap") | places)
    sets = RunFolder(study.base_run().run_dir).read_table("error_overlap")
    assert sets["questions"].sum() == 64 and "not comparable (other task: wordproblems" in shown


def test_02_and_03_train_and_show_both_stages(study, tmp_path):
    p = study.run("full", 0)
    places = {"run_dir": str(p.run_dir), "stage1_dir": str(p.stage1_dir)}
    shown = execute(part("02_mef", tmp_path), as_f("02_mef") | places)
    assert outputs.stage_faults("mef", p) == [] and "nothing has run here yet" in shown
    assert RunFolder(p.folder("mef")).read_table("training_answers")["kept"].tolist() == [64, 64, 64]
    shown = execute(part("03_riel", tmp_path), as_f("03_riel") | places)
    assert outputs.stage_faults("riel", p) == [] and "mef: nothing to train" in shown
    for text in ("Loss grpo", "Loss mutual", "Loss buffer_sft", "groups_all_wrong", "MEML-GRPO (Expert1)"):
        assert text in shown, text


def test_02_runs_twice_in_one_kernel_from_the_notebooks_folder(study, tmp_path):
    """As `Run all`, twice, in JupyterLab."""
    p = study.run("full", 0)
    notebook = nbformat.read(path("02_mef"), as_version=4)
    for name, place in (("run_dir", p.run_dir), ("stage1_dir", p.stage1_dir)):
        for cell in notebook.cells:
            cell.source = re.sub(rf"^{name} = None", f"{name} = {str(place)!r}", cell.source, flags=re.MULTILINE)
    again = copy.deepcopy(notebook.cells)
    for cell in again:
        cell.id, cell.metadata = f"{cell.id}-again", nbformat.NotebookNode()
    notebook.cells += again
    nbformat.write(notebook, tmp_path / "twice.ipynb")
    assert execute(tmp_path / "twice.ipynb", {}, cwd=ROOT / "notebooks").count("mef: nothing to train") == 2


@pytest.mark.parametrize("name", OF_STUDY)
def test_04_and_05_show_what_has_run_and_what_has_not(study, tmp_path, name):
    shown = execute(part(name, tmp_path), as_f(name) | {"reports_dir": str(study.folder.parent)})
    assert "MEML-GRPO" in shown and "not run" in shown
    assert name == "04_ablations" or (study.folder / "report" / "report.html").is_file()


@pytest.mark.parametrize("name", FILES)
def test_a_named_file_is_read(tmp_path, name):
    """`papermill -p params_file FILE`."""
    file = FILES[name].replace("smoke", "demo")
    assert file in execute(part(name, tmp_path, last="from_notebook"), {"params_file": file})


@pytest.mark.parametrize("name", ["00_experts", "05_report"])
def test_a_misspelt_parameter_is_not_passed_over(tmp_path, name):
    with pytest.raises(PapermillExecutionError, match="parms_file: nothing reads .* did you mean 'params_file'"):
        execute(part(name, tmp_path, last="from_notebook"), {"parms_file": FILES[name]})


@pytest.mark.skipif(not os.environ.get("MEML_DATA_DIR"), reason="set MEML_DATA_DIR to the released data sets")
def test_01_shows_the_known_overlap_of_four_published_models():
    p = config.load_run(ROOT / "params/gsm8k-published.yaml")
    panel, task = experts.load_panel(p.experts), tasks.load(p.task)
    assert len(experts.teacher_answers(task, panel)) == 0  # nothing to train on
    answers = experts.teacher_answers(task, panel, questions=experts.answered_questions(task, panel))
    shared = overlap.shared_errors(answers).iloc[-1]
    assert list(100 * overlap.accuracy(answers)["share"]) == pytest.approx([21.7, 39.0, 34.7, 56.3], abs=0.2)
    assert [100 * shared["iou"], 100 * shared["all_wrong_share"]] == pytest.approx([37.1, 32.8], abs=0.2)
