"""Composition, checks and messages of values; what a notebook's parameter cells ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell

from meml_lib import config, schema
from meml_lib.config import ParamsError, load_run, load_study

SHIPPED = Path(__file__).parents[1] / "params"


@pytest.fixture
def params(tmp_path, monkeypatch):
    """A project folder of its own: write(name, text) writes params/NAME."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        file = tmp_path / "params" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return f"params/{name}"

    for file in SHIPPED.rglob("*.yaml"):
        write(str(file.relative_to(SHIPPED)), file.read_text())
    return write


# --- composition ------------------------------------------------------------------------------------------------------


def test_later_files_win_mappings_merge_lists_replace(params):
    params("part.yaml", "riel: {steps: 7, lr: 1e-4}\nexperts: {panel: [story, groups]}\n")
    file = params("own.yaml", "use: [smoke.yaml, part.yaml]\nriel: {steps: 9}\n")
    p = load_run(file, {"seed": 3})
    assert (p.riel.steps, p.riel.lr, p.riel.questions_per_step, p.seed) == (9, 1e-4, 2, 3)
    assert p.experts.panel == ("story", "groups")
    assert p.sources["riel.steps"] == "params/own.yaml:2"
    assert p.sources["riel.lr"] == "params/part.yaml:1"
    assert p.sources["seed"] == "override"
    assert p.sources["mef.answers_per_step"].startswith("params/smoke.yaml:")


def test_text_1e_minus_6_becomes_a_number():
    assert load_run("params/smoke.yaml", ["riel.lr=1e-6"]).riel.lr == 1e-6


def test_another_kind_of_task_or_model_replaces_and_the_same_kind_merges(params):
    file = params("own.yaml", "use: [smoke.yaml, tasks/gsm8k.yaml, experts/gsm8k.yaml]\nmodel: {source: hub, path: x/y, dtype: float32}\n"
               "experts: {panel: [gold]}\n")
    p = load_run(file)
    assert isinstance(p.task, schema.ReleasedParams) and isinstance(p.model, schema.HubModelParams)
    same = load_run(file, {"task.name": "mathqa"})
    assert same.task == p.task.model_copy(update={"name": "mathqa"})
    with pytest.raises(ParamsError, match="model.path is missing"):
        load_run("params/smoke.yaml", {"model.source": "hub"})  # hidden_size is gone, and so not complained about


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_processes: 3", "a.yaml:1: num_processes = 3: must be 2 .hardware.processes"),
        ("mixed_precision: bf16", "mixed_precision = 'bf16': must be no .* .model.dtype says it"),
        ("distributed_type: DEEPSPEED", "distributed_type = 'DEEPSPEED': must be NO or MULTI_CPU or MULTI_GPU or FSDP"),
        ("distributed_type: FSDP", "fsdp_config.fsdp_version = None: must be 2"),
        ("fsdp_version: 1", "a.yaml:3: fsdp_config.fsdp_version = 1: must be 2 .FSDP2"),
        ("fsdp_version: 2", "fsdp_cpu_ram_efficient_loading = None: must be False .every process loads"),
        ("fsdp_version: 2, fsdp_cpu_ram_efficient_loading: false, fsdp_offload_params: true",
         "fsdp_offload_params = True: must be False"),
        ("fsdp_version: 2, fsdp_cpu_ram_efficient_loading: false, fsdp_activation_checkpointing: true",
         "fsdp_activation_checkpointing = True: must be False .hardware.gradient_checkpointing"),
    ],
)  # fmt: skip
def test_an_accelerate_config_may_not_contradict_the_run(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(f"distributed_type: FSDP\nfsdp_config:\n  {{{text}}}\n" if text.startswith("fsdp_") else f"{text}\n")
    p = load_run("smoke.yaml", {"hardware.processes": 2, "hardware.accelerate_config": str(file)})
    with pytest.raises(ParamsError, match=message):
        config.accelerate_values(p)
    file.unlink()
    with pytest.raises(ParamsError, match="hardware.accelerate_config=.*a.yaml: no such file"):
        config.accelerate_values(p)


def test_circle_and_missing_file_are_named(params):
    params("a.yaml", "use: [b.yaml]\n")
    params("b.yaml", "use: [a.yaml]\n")
    with pytest.raises(ParamsError, match="circle: params/a.yaml -> params/b.yaml -> params/a.yaml"):
        load_run("params/a.yaml")
    with pytest.raises(ParamsError, match="no file 'hardware/cpu3.yaml'.*did you mean 'hardware/cpu"):
        load_run(params("c.yaml", "use: [hardware/cpu3.yaml]\n"))
    with pytest.raises(ParamsError, match="params/d.yaml:3: seed stands here twice"):
        load_run(params("d.yaml", "use: [smoke.yaml]\nseed: 1\nseed: 2\n"))
    with pytest.raises(ParamsError, match="params/e.yaml is not YAML.*line 2"):
        load_run(params("e.yaml", "use: [smoke.yaml]\nseed: [1\n"))


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_shipped_run_file_is_good(file):
    if file.stem in ("base", "grpo", "dr-grpo"):  # parts
        assert yaml.safe_load(file.read_text())
    else:
        load_run(file)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("studies/*.yaml")), ids=lambda f: f.stem)
def test_every_shipped_study_is_good(file):
    load_study(file)


def test_base_gives_every_value_that_no_part_gives():
    given = {".".join(path) for path, _ in config.leaves(yaml.safe_load(Path("params/base.yaml").read_text()))}
    lacking = {
        key
        for key in config._keys(schema.RunParams)
        if key.split(".")[0] not in ("task", "experts", "model") and key not in given
    }
    assert not {key for key in lacking if not any(name.startswith(f"{key}.") for name in given)}


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("riel.stpes=1", "riel.stpes is not a known key; did you mean 'riel.steps'?"),
        ("riel.capacity=1", "riel.capacity is not a known key; did you mean 'riel.objective.buffer_sft.capacity'?"),
        ("modle.lora=null", "modle is not a known key; did you mean 'model'?"),
        ("experts.known.story.teacher.stile=x", "teacher.stile is not a known key; did you mean"),
        ("riel.steps=0", "riel.steps = 0: must be greater than 0"),
        ("riel.steps=many", "riel.steps = 'many': must be a valid integer"),
        ("riel.steps=1.5", "riel.steps = 1.5: must be a valid integer"),
        ("riel.steps=true", "riel.steps = True: must not be a yes/no value"),
        ("riel.steps='3'", "riel.steps = '3': must be a whole number, not text"),
        ("mef.allow_test_questions=1", "mef.allow_test_questions = 1: must be true or false"),
        ("riel.steps=null", "riel.steps = null: must be a valid integer"),
        ("lr=1e-3", "lr is not a known key; did you mean 'mef.lr' or 'riel.lr'?"),
        ("tracking.trackers=tensorboard", "tracking.trackers = 'tensorboard': must be a list"),
        ("experts.known.story.teacher.style=storry", "teacher.style='storry' is none of the styles .*mean 'story'?"),
        ("experts.known.story.teacher.mistaken_on=los", "mistaken_on='los' is none of .*did you mean 'loss'?"),
        ("evaluate.test_questions=9", "evaluate.test_questions=9 exceeds task.test_questions=8"),
        ("model.heads=3", "hidden_size=32 must be a multiple of 2 x heads=3"),
        ("riel.lr=.inf", "riel.lr = inf: must be a finite number"),
        ("riel.objective.grpo.scale=sdt", "scale = 'sdt': must be one of 'none' or 'std'; did you mean 'std'?"),
        ("task.name=gsm9k", "task.name = 'gsm9k': must be one of .*did you mean 'gsm8k'?"),
        ("riel=3", "riel must be a mapping of keys; it is of type int"),
        ("model.lora.rank=4", "model.lora.alpha is missing: no file gives it"),
        ("experts.panel=[storry]", "override: experts: panel names 'storry', which experts.known lacks.*mean 'story'?"),
        ("riel.objective.buffer_sft.wrong_over=4", "wrong_over=4 must be < rollouts_per_expert=4"),
        ("riel.steps", "must read key=value"),
        ("riel.steps=", "must read key=value"),
        ("riel..steps=1", "must be a dotted key"),
        ("riel.steps=[1", "is not YAML"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_bound_and_nearest_name(override, message):
    with pytest.raises(ParamsError, match=message.replace("?", r"\?")):
        load_run("params/smoke.yaml", [override])


def test_a_fault_names_file_and_line_and_all_faults_come_at_once(params):
    file = params("own.yaml", "use: [smoke.yaml]\nriel:\n  steps: 0\n  stepps: 1\n")
    with pytest.raises(ParamsError) as caught:
        load_run(file)
    places = sorted(line.split(": ")[0] for line in str(caught.value).splitlines())
    assert places == ["params/own.yaml:3", "params/own.yaml:4"]
    with pytest.raises(ParamsError, match=r"task is missing: no file gives it; use one of params/tasks/\*.yaml"):
        load_run(params("bare.yaml", "use: [base.yaml]\n"))


def test_a_fault_between_values_names_the_place_of_each(params):
    file = params("own.yaml", "use: [smoke.yaml]\nseed: 1\nmef: {epochs: 2}\n")
    with pytest.raises(ParamsError, match=r"^params/own.yaml:3, params/smoke.yaml:\d+: mef: give exactly one of epochs=2.0 and"):
        load_run(file)


def test_a_run_is_frozen_and_shows_values_with_their_source():
    p = load_run("params/smoke.yaml")
    with pytest.raises(ValueError, match="frozen"):
        p.seed = 1
    assert "<td>riel.steps</td><td>3</td><td>params/smoke.yaml:" in p._repr_html_()
    assert config.Run.model_validate_json(p.model_dump_json()) == p


# --- studies ----------------------------------------------------------------------------------------------------------


def test_arms_share_stage_1_where_all_that_it_reads_is_equal(params):
    text = (config.root() / "params/studies/demo.yaml").read_text()
    extra = "arms:\n  other: {label: Other, overrides: {mef.steps: 5}}\n"
    extra += "  slow: {label: Slow, overrides: {riel.steps: 1, hardware.threads: 2}}\nnotes:"
    study = load_study(params("studies/own.yaml", text.replace("notes:", extra)))
    assert study.stage1_groups() == {
        "stage1-equations": ("single", "single-buffer"),
        "stage1-equations+story+groups": ("multi", "buffer", "mutual", "full", "slow"),
        "stage1-equations+story+groups-2": ("other",),
    }
    full, other = study.run("full", 0), study.run("other", 0)
    assert full.folder("riel") == study.folder / "runs/full/seed-0/stage2"
    assert full.folder("mef") == study.folder / "runs/stage1-equations+story+groups/seed-0/stage1"
    assert other.folder("mef") == study.folder / "runs/stage1-equations+story+groups-2/seed-0/stage1"


def test_experts_by_position_are_the_arm_that_names_them(params):
    by_name, by_place = (load_run("params/demo.yaml", {key: value}) for key, value in
                         (("experts.panel", ["groups", "equations"]), ("experts.only", [2, 0])))  # fmt: skip
    assert by_place.experts == by_name.experts and by_place.reads("mef") == by_name.reads("mef")
    assert by_place.sources["experts.panel"] == "override"
    for places in ([3], [], [-1], [0.5]):
        with pytest.raises(ParamsError, match=r"experts.*0 to 2|experts.only"):
            load_run("params/demo.yaml", {"experts.only": places})
    with pytest.raises(ParamsError, match="names an expert twice"):
        load_run("params/demo.yaml", {"experts.only": [0, 0]})


def test_an_arm_uses_parts_of_run_files_and_its_own_overrides_win(params):
    arms = "arms:\n  a: {label: A, use: [objectives/grpo.yaml], overrides: {riel.objective.grpo.weight: 0.5}}\n"
    study = load_study(params("studies/own.yaml", "title: t\nrun_file: smoke.yaml\nseeds: [0]\n" + arms))
    run = study.run("a", 0)
    assert run.riel.objective.mutual is None and run.riel.objective.grpo.scale == "std"
    assert run.riel.objective.grpo.weight == 0.5
    assert run.sources["riel.objective.mutual"].startswith("params/objectives/grpo.yaml:")
    again = config.load_run(study.run_params_file, study.overrides_of("a", 0))
    assert again.riel == run.riel  # what a notebook of the arm gets
    wrong = "arms:\n  a: {label: A, use: [objectives/grop.yaml]}\n"
    with pytest.raises(ParamsError, match="did you mean 'objectives/grpo.yaml'"):
        load_study(params("studies/wrong.yaml", "title: t\nrun_file: smoke.yaml\nseeds: [0]\n" + wrong))


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ("{t: {full: {mulit: vote}}}", r"^params/studies/own.yaml:2, .*compare.t.full.mulit names 'mulit', which is no arm.*mean 'multi'\?"),
        ("{t: {full: {multi: mean_exprt}}}", r"own.yaml:2: compare.t.full.multi = 'mean_exprt': .*did you mean 'mean_expert'\?"),
        ("{t: {full: {multi: expert-3}}}", r"own.yaml:\d+: expert-3: the panel .* has positions 0 to 2"),
    ],
)
def test_comparisons_are_checked(params, compare, message):
    with pytest.raises(ParamsError, match=message):
        load_study(params("studies/own.yaml", f"use: [studies/smoke.yaml]\ncompare: {compare}\n"))


def test_comparisons_of_used_files_add_up_and_null_leaves_one_out(params):
    own = "use: [studies/demo.yaml]\ncompare: {table-5: {full: {multi: null, single: vote}}}\n"
    pairs = load_study(params("studies/own.yaml", own)).comparisons
    assert ("table-5", "mutual", "multi", "mean_expert") in pairs and ("table-5", "full", "single", "vote") in pairs
    assert ("controls", "full", "single-buffer", "mean_expert") in pairs
    assert not [pair for pair in pairs if pair[:3] == ("table-5", "full", "multi")]


def test_study_then_arm_then_seed_then_command_line(params):
    file = params(
        "studies/own.yaml",
        "title: t\nrun_file: smoke.yaml\nseeds: [4, 5]\noverrides: {riel.steps: 5, riel.objective.mutual: null}\n"
        "arms:\n  a: {label: A}\n  b:\n    label: B\n    overrides: {riel.steps: 6}\n",
    )
    study = load_study(file, ["riel.questions_per_step=1"])
    a, b = study.run("a", 4), study.run("b", 5)
    assert (a.riel.steps, b.riel.steps, a.seed, b.seed, b.riel.questions_per_step) == (5, 6, 4, 5, 1)
    assert b.sources["riel.steps"] == "params/studies/own.yaml:9" and b.sources["seed"] == "params/studies/own.yaml:3"
    assert load_study(file, ["riel.steps=9"]).run("b", 4).riel.steps == 9
    assert load_study(file, ["seeds=[7]"]).seeds == (7,)
    again = load_run(study.run_params_file, study.overrides_of("b", 5), b.run_dir, b.stage1_dir)
    assert again.values() == b.values()
    with pytest.raises(ParamsError, match="give seeds="):
        load_study(file, ["seed=7"])
    with pytest.raises(ParamsError, match="own.yaml:9: riel.stps is not a known key"):
        params("studies/own.yaml", Path(file).read_text().replace("riel.steps: 6", "riel.stps: 6"))
        load_study(file)
    with pytest.raises(ParamsError, match="no arm 'c'"):
        study.run("c", 4)


def test_a_study_names_where_its_own_values_stand(params):
    text = "title: t\nrun_file: smoke.yaml\nseeds: [4]\narms:\n  a: {label: A, use: [objectives/grpo.yaml]}\nnotes: n\n"
    study = load_study(params("studies/own.yaml", text), ["notes=other"])
    rows = {key: (value, source) for key, value, source in study.rows()}
    assert rows["seeds"] == ([4], "params/studies/own.yaml:3") and rows["notes"] == ("other", "override")
    assert rows["arms.a.label"] == ("A", "params/studies/own.yaml:5") and rows["arms.a.last_stage"] == ("riel", "default")
    assert rows["arms.a.overrides.riel.objective.mutual"][1].startswith("params/objectives/grpo.yaml:")
    assert {source for _, source in rows.values()} > {"override", "default"}


@pytest.mark.parametrize(("given", "source"), [([], "params/base.yaml:6"), (["seed=3"], "override")])
def test_the_seed_of_a_run_file_names_its_own_place(given, source):
    assert load_study("params/smoke.yaml", given).base_run().sources["seed"] == source


@pytest.mark.parametrize("where", ["overrides: {seed: 3}\n", "arms: {a: {label: A, overrides: {seed: 3}}}\n"])
def test_a_seed_that_nothing_would_read_is_refused(params, where):
    text = "title: t\nrun_file: smoke.yaml\nseeds: [4]\n" + ("" if "arms" in where else "arms: {a: {label: A}}\n")
    with pytest.raises(ParamsError, match=r"own.yaml:\d: seed: nothing reads it here"):
        load_study(params("studies/own.yaml", text + where))


def test_a_misspelt_arm_on_the_command_line_is_no_new_one():
    with pytest.raises(ParamsError, match="override: arms.multii is not a known key; did you mean 'arms.multi'"):
        load_study("params/studies/smoke.yaml", ["arms.multii.label=x"])


def test_an_override_given_again_moves_behind_what_it_must_beat(params):
    file = params(
        "studies/own.yaml",
        "title: t\nrun_file: smoke.yaml\nseeds: [0]\narms: {a: {label: A, overrides: {riel.objective.mutual: null}}}\n",
    )
    mutual = {"weight": 0.5, "form": "k2", "divide_by": "tokens"}
    study = load_study(file, {"riel.objective.mutual": mutual})
    assert study.run("a", 0).riel.objective.mutual.form == "k2"
    assert load_run("params/smoke.yaml", study.overrides_of("a", 0)).riel.objective.mutual.form == "k2"


def test_a_run_file_is_a_study_of_one_arm_and_one_seed():
    study = load_study("params/smoke.yaml", ["seed=3", "riel.steps=1"])
    assert (list(study.arms), study.seeds, study.run_params_file) == (["smoke"], (3,), "params/smoke.yaml")
    assert study.run("smoke", 3).riel.steps == 1
    assert study.folder.name == "smoke-run"  # not the folder of params/studies/smoke.yaml
    with pytest.raises(ParamsError, match="is a study"):
        load_run("params/studies/smoke.yaml")


# --- notebooks --------------------------------------------------------------------------------------------------------

DEFAULTS = 'params_file = "params/smoke.yaml"\noverrides = {}\nrun_dir = None\nstage1_dir = None'
CALL = "p = config.from_notebook(globals()); p"
INJECTED = '# Parameters\nuse = ["smoke.yaml"]\nriel = {"steps": 5}\nexperts = {"panel": ["story"]}\nseed = 4\n'


@pytest.fixture
def cell(params):
    """Runs cells as a Jupyter kernel does; gives p, or raises what the cell raised."""
    shell = InteractiveShell()

    def run(*sources: str):
        for source in sources:
            result = shell.run_cell(source, store_history=True)
            result.raise_error()
        return shell.user_ns.get("p")

    run("from meml_lib import config")
    return run


def test_parameter_cells_then_a_second_run_all_after_the_notebook_made_its_own_names(cell):
    rest = ("from meml_lib import experts", "index = 3", "seed = 11", "title = 'x'", "n = [i for i in range(3)]")
    for _ in range(2):
        p = cell(DEFAULTS, CALL, *rest)
        assert (p.params_file, p.seed, p.experts.panel) == ("params/smoke.yaml", 0, ("equations", "story", "groups"))
    assert cell(CALL, CALL).seed == 0  # the cell again, alone


def test_papermill_p_overrides_the_default_cell(cell):
    p = cell(DEFAULTS, '# Parameters\nparams_file = "params/demo.yaml"\noverrides = {"riel.steps": 2}\n', CALL)
    assert (p.params_file, p.riel.steps) == ("params/demo.yaml", 2)


def test_papermill_f_makes_the_injected_sections_the_run_file(cell):
    p = cell(DEFAULTS, INJECTED, "from meml_lib import experts", CALL)
    assert (p.riel.steps, p.experts.panel, p.seed, p.sources["riel.steps"]) == (5, ("story",), 4, "notebook")
    assert cell("experts = 1", CALL).experts.panel == ("story",)
    assert cell(DEFAULTS, CALL).seed == 0  # the default cell again: its file wins
    assert cell(DEFAULTS, INJECTED, CALL).seed == 4


def test_sections_equal_to_a_shipped_file_are_that_file(cell):
    sections = yaml.safe_load(Path("params/demo.yaml").read_text())
    p = cell(DEFAULTS, "# Parameters\n" + "\n".join(f"{key} = {value!r}" for key, value in sections.items()), CALL)
    assert (p.params_file, p.riel.steps) == ("params/demo.yaml", load_run("params/demo.yaml").riel.steps)


ONE = 'params_file = "params/smoke.yaml"'


@pytest.mark.parametrize(
    ("cells", "message", "mended"),
    [
        (["parms_file = 'params/smoke.yaml'"], "parms_file: .*did you mean 'params_file'", [ONE]),
        ([DEFAULTS + "\noverides = {}"], "overides: .*did you mean 'overrides'", [DEFAULTS]),
        ([ONE, "# Parameters\nriell = {'steps': 3}"], "riell: .*did you mean 'riel'", [INJECTED]),
        ([ONE, "# Parameters\nlearning_rate = 3"], "learning_rate: nothing reads", [ONE]),
        ([ONE, "# Parameters\nseed = float('nan')"], "seed = float.*plain value", [INJECTED]),
        ([ONE, "# Parameters\nparams_file = 'x'\nseed = 3"], "keep one of them", ["# Parameters\n" + ONE]),
    ],
)
def test_a_stray_name_is_refused_until_its_cell_ran_again_without_it(cell, cells, message, mended):
    for again in (cells, [], ["note = 'something else'"]):
        with pytest.raises(ParamsError, match=message):
            cell(*again, CALL)
    assert cell(*mended, CALL)


def test_a_parameter_beside_code_counts_and_other_names_there_do_not(cell):
    assert cell(DEFAULTS, 'import os; overrides = {"riel.steps": 8}; riel = {"steps": 1}; ' + CALL).riel.steps == 8
    with pytest.raises(ParamsError, match="overrides = dict.*must be a plain value"):
        cell("overrides = dict(a=1)", CALL)


def test_values_are_checked_in_the_notebook_too(cell):
    with pytest.raises(ParamsError, match="riel.steps = 0: must be greater than 0"):
        cell(DEFAULTS, '# Parameters\noverrides = {"riel.steps": 0}', CALL)


def test_study_notebooks_by_both_habits(cell):
    call = "p = config.study_from_notebook(globals()); p"
    defaults = 'params_file = "params/studies/smoke.yaml"\noverrides = {}\nreports_dir = "elsewhere"'
    study = cell(defaults, '# Parameters\noverrides = {"riel.steps": 2}', call)
    assert (study.name, study.folder.parent.name, study.run("full", 0).riel.steps) == ("smoke", "elsewhere", 2)
    sections = yaml.safe_load(Path("params/studies/demo.yaml").read_text())
    study = cell(defaults, "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in sections.items()), call)
    assert (study.name, len(study.arms), study.folder.parent.name) == ("demo", 6, "elsewhere")
    with pytest.raises(ParamsError, match="reports_dri: .*did you mean 'reports_dir'"):
        cell(defaults, "# Parameters\nreports_dri = 'x'", call)


def test_a_script_is_judged_by_its_literals():
    assert config.from_notebook({"params_file": "params/smoke.yaml", "experts": pytest, "index": 3}).seed == 0
    with pytest.raises(ParamsError, match="did you mean 'params_file'"):
        config.from_notebook({"parms_file": "params/smoke.yaml"})
    with pytest.raises(ParamsError, match="params_file = None must name a file"):
        config.from_notebook({})


def test_patience_without_validations_is_refused():
    with pytest.raises(ParamsError, match="mef: patience=2 needs validate_every, which is null"):
        load_run("params/demo.yaml", {"mef.patience": 2})


@pytest.mark.parametrize(("part", "scale", "divide_by"), [("grpo", "std", "answer"), ("dr-grpo", "none", "constant")])
def test_a_baseline_is_a_part_of_params_and_not_a_branch(tmp_path, part, scale, divide_by):
    file = tmp_path / "baseline.yaml"
    file.write_text(f"use: [smoke.yaml, objectives/{part}.yaml]\n")
    objective = load_run(file).riel.objective
    assert (objective.grpo.advantage, objective.grpo.scale, objective.grpo.divide_by) == ("signed", scale, divide_by)
    assert objective.mutual is None and objective.buffer_sft is None


def test_positions_set_for_all_arms_and_by_an_arm_are_refused():
    with pytest.raises(ParamsError, match="experts.only is set for all arms, and by single, single-buffer too"):
        load_study("params/studies/demo.yaml", ["experts.only=[1,2]"])
    assert load_study("params/studies/smoke.yaml", ["experts.only=[1,2]"]).base_run().experts.panel == ("story", "groups")


def test_a_budget_needs_a_constant_rate():
    with pytest.raises(ParamsError, match="stop_at.update_tokens would cut decay=linear"):
        load_run("params/smoke.yaml", {"riel.stop_at.update_tokens": 9, "riel.decay": "linear"})


def test_the_config_of_a_dry_run_makes_no_result_stale():
    p, other = (load_run("paper-qwen-gsm8k.yaml", {"model.config.num_hidden_layers": n}) for n in (28, 2))
    assert p.model.config != other.model.config and p.reads("mef") == other.reads("mef")
