"""A run's folder: what is written is whole, what is broken is refused, what is locked stays alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from meml_lib import runs
from meml_lib.runs import RunFolder


def test_tables_metrics_and_status_come_back_as_written(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.status["state"] == "absent"
    table = pd.DataFrame({"question_id": ["a", "b"], "correct": pd.array([True, None], dtype="boolean")})
    folder.write_table("answers", table)
    pd.testing.assert_frame_equal(folder.read_table("answers"), table)
    folder.append_metrics({"step": 0, "loss": 1.5, "reward": None})
    folder.append_metrics({"step": 1, "loss": 1.0, "reward": 0.5})
    assert folder.read_metrics()["loss"].tolist() == [1.5, 1.0]
    folder.set_status("done", "well", extra=[1])
    assert folder.status == {"state": "done", "message": "well", "extra": [1]}


def test_what_is_not_there_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_table("answers", pd.DataFrame({"a": [1]}))
    with pytest.raises(FileNotFoundError, match=r"no table 'answer'.*\['answers'\]; absent"):
        folder.read_table("answer")
    with pytest.raises(FileNotFoundError, match="no metrics.jsonl"):
        folder.read_metrics()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=f"metric loss/grpo = {value} at step 7"):
        RunFolder(tmp_path).append_metrics({"step": 7, "loss/grpo": value})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_still_being_written_is_left_for_later(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n{"step"')
    records, offset = RunFolder(tmp_path).metrics_from(0)
    assert (records, offset) == ([{"step": 0}], 12)
    with open(file, "ab") as stream:
        stream.write(b": 1}\n")
    assert RunFolder(tmp_path).metrics_from(offset) == ([{"step": 1}], 24)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("values", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("values", {"a": float("nan")})
    assert folder.read_json("values") == {"a": 1}
    assert os.listdir(tmp_path) == ["values.json"]


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path):
    code = "import sys, time; from meml_lib import runs\n"
    code += "with runs.locked(runs.Path(sys.argv[1]), 'x'): print(1, flush=True); time.sleep(60)"
    lock = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(runs.InUse, match=f"s is in use by process {holder.pid}"), runs.locked(lock, "s"):
            pass
    finally:
        holder.kill()  # as the system or a user might: no clean-up runs
        holder.wait()
    with runs.locked(lock, "study s", wait_s=5):
        assert int(lock.read_text()) == os.getpid()


def test_the_manifest_names_its_makings_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(sys, "argv", ["meml", "api_key=hf_secret", "sampling.max_answer_tokens=96"])
    RunFolder(tmp_path).write_manifest(seed=3)
    text = (tmp_path / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["seed"] == 3 and manifest["packages"]["torch"] and manifest["hardware"]["cores"] >= 1
    assert manifest["command"] == ["meml", "api_key=...", "sampling.max_answer_tokens=96"]
    assert "hf_secret" not in text


def test_a_committed_report_written_anew_is_no_change_of_the_sources(tmp_path, monkeypatch):
    for name in ("meml_lib/runs.py", "reports/demo/report.md", "params/demo.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("before\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "meml_lib" / "runs.py"))
    monkeypatch.chdir(tmp_path / "params")
    assert runs.provenance()["dirty"] is False
    (tmp_path / "reports/demo/report.md").write_text("after\n")
    assert runs.provenance()["dirty"] is False
    (tmp_path / "params/demo.yaml").write_text("after\n")
    assert runs.provenance()["dirty"] is True
