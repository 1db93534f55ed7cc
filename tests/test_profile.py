"""`meml run --profile-steps`: what a step's time is said to be is what it took, and results do not change."""

import gzip
import json

import pandas as pd
import pytest

from meml_lib import config
from meml_lib.runs import RunFolder
from meml_lib.training import stage


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Stage 1 of smoke, with a profile and without."""
    found = {}
    for steps in (0, 2):
        values = {"tracking.profile_steps": steps, "mef.steps": 6, "evaluate.test_questions": 2}
        p = config.load_run("params/smoke.yaml", values, run_dir=tmp_path_factory.mktemp("run"))
        stage.run("mef", p)
        found[steps] = RunFolder(p.folder("mef"))
    return found


def test_the_spans_of_a_step_take_what_the_step_took(folders):
    table = pd.read_csv(folders[2].path / "profile" / "time.csv").set_index("name")
    update = table.loc["update"]
    assert update["kind"] == "span" and update["calls"] == 1
    # A profile slows what it looks at: the steps looked at are the third and the fourth.
    took = folders[2].read_metrics()["seconds"][2:4].mean()
    assert update["seconds"] == pytest.approx(took, rel=0.3)
    within = table.loc[["forward and backward pass", "optimizer step"], "seconds"].sum()
    assert 0.5 * update["seconds"] < within < update["seconds"]
    assert table.query("kind == 'operation'")["own_seconds"].is_monotonic_decreasing


def test_the_trace_holds_spans_and_operations(folders):
    with gzip.open(folders[2].path / "profile" / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("meml: update") == 2 and "aten::addmm" in names or "aten::mm" in names


def test_a_profile_changes_no_result_and_is_not_written_unasked(folders):
    losses = [folder.read_metrics()["loss"].tolist() for folder in folders.values()]
    assert losses[0] == losses[1]
    assert not (folders[0].path / "profile").exists()


def test_too_few_steps_say_so(tmp_path, capsys):
    values = {"tracking.profile_steps": 2, "mef.steps": 1, "evaluate.test_questions": 1}
    p = config.load_run("params/smoke.yaml", values, run_dir=tmp_path)
    stage.run("mef", p)
    assert "training ended within its first two steps" in capsys.readouterr().out
