"""Trackers: what goes to accelerate's is what metrics.jsonl holds, and they change no result."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from meml_lib import cli, config, runs
from meml_lib.pipeline import graph, keys, launch
from meml_lib.runs import RunFolder
from meml_lib.training import riel, stage

TENSORBOARD = "tracking.trackers=[tensorboard]"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(overrides) -> a smoke run in a temporary folder."""
    monkeypatch.setenv(runs.HEADLESS, "1")
    return lambda *overrides: config.load_run("params/smoke.yaml", overrides, run_dir=tmp_path / "run")


def scalars(p: config.Run, stage: config.Stage) -> dict[tuple[str, int], float]:
    """(name, step) -> value, of a stage's event files."""
    events = EventAccumulator(str(p.folder(stage) / "tracking" / p.tracking.project)).Reload()
    return {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}


def recorded(p: config.Run, stage: config.Stage) -> dict[tuple[str, int], float]:
    """The same of metrics.jsonl; a step without some number has no event of it."""
    records, _ = RunFolder(p.folder(stage)).metrics_from(0)
    return {
        (name, record["step"]): value
        for record in records
        for name, value in record.items()
        if value is not None and name != "step"
    }


def test_tensorboard_holds_every_number_of_every_step_and_the_values(run):
    p = run(TENSORBOARD, "tracking.project=mine")
    for name in ("mef", "riel"):
        launch.train(name, p)
        assert scalars(p, name) == pytest.approx(recorded(p, name), rel=1e-6)  # float32
        (values,) = (p.folder(name) / "tracking" / "mine").glob("*/hparams.yml")
        told = values.read_text()
        assert "riel.lr: 0.0003\n" in told and "experts.panel: '[\"equations\", \"story\", \"groups\"]'" in told
    assert len({step for _, step in scalars(p, "riel")}) == 3


def test_without_trackers_nothing_is_said_of_them(run, recwarn):
    launch.train("mef", run())
    assert not [warning for warning in recwarn if "track" in str(warning.message)]
    assert not (run().folder("mef") / "tracking").exists()


def test_trackers_change_no_result_and_retrain_nothing(run, capsys):
    launch.train("mef", run(TENSORBOARD))
    before = RunFolder(run().folder("mef")).read_metrics()
    capsys.readouterr()
    for other in ("tracking.trackers=[]", "tracking.project=other"):
        assert launch.train("mef", run(other)).equals(before)
        assert "mef: nothing to train" in capsys.readouterr().out
    assert keys.stage_parts("riel", run()) == keys.stage_parts("riel", run(TENSORBOARD))
    assert scalars(run(), "mef")  # they stay where they were written


def test_a_training_that_fails_leaves_its_steps_with_the_tracker_and_closes_it(run, monkeypatch):
    p = run(TENSORBOARD)
    launch.train("mef", p)
    steps, opened = riel.train, []

    def breaks(*args):
        for step in steps(*args):
            if step.metrics["step"] == 2:
                raise RuntimeError("no memory")
            yield step

    def remembered(accelerator, *args, **options):
        init(accelerator, *args, **options)
        opened.extend(accelerator.trackers)

    init = stage.Accelerator.init_trackers
    monkeypatch.setattr(stage.Accelerator, "init_trackers", remembered)
    monkeypatch.setattr(riel, "train", breaks)
    with pytest.raises(RuntimeError, match="no memory"):
        launch.train("riel", p)
    assert {step for _, step in scalars(p, "riel")} == {0, 1}
    assert scalars(p, "riel") == pytest.approx(recorded(p, "riel"), rel=1e-6)
    (tracker,) = opened
    assert tracker.writer.all_writers is None  # closed
    monkeypatch.setattr(riel, "train", steps)
    launch.train("riel", p)
    assert {step for _, step in scalars(p, "riel")} == {0, 1, 2}  # its own steps alone


def test_of_two_processes_one_writes(run):
    p = run(TENSORBOARD, "hardware.processes=2", "mef.validate_every=null")
    launch.train("mef", p)
    folder = p.folder("mef") / "tracking" / p.tracking.project
    assert len(list(folder.glob("events*"))) == 1
    assert scalars(p, "mef") == pytest.approx(recorded(p, "mef"), rel=1e-6)


def test_a_tracker_that_is_not_installed_is_named_before_any_work(run, monkeypatch, tmp_path):
    p = run("tracking.trackers=[tensorboard,aim]")
    message = r"tracking.trackers \(override\): aim is not installed here: pip install aim"
    with pytest.raises(config.ParamsError, match=message):
        launch.train("mef", p)
    assert not p.folder("mef").exists()
    study = config.load_study("params/smoke.yaml", ["tracking.trackers=[aim]"], tmp_path / "reports")
    with pytest.raises(config.ParamsError, match="pip install aim"):
        graph.run(study, 1, print)
    assert not (tmp_path / "reports").exists()
    said = CliRunner().invoke(cli.app, ["check", "params/smoke.yaml", "--set", "tracking.trackers=[aim]", "--dry-run"])
    assert said.exit_code == 2 and "aim is not installed here: pip install aim" in said.stderr
