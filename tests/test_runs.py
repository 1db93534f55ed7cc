"""A run's folder: what is written is whole, what is broken is refused, what is locked stays alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

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


# --- provenance -------------------------------------------------------------------------------------------------------


def test_the_manifest_names_its_makings_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.delenv(runs.COMMAND, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    words = ["api_key=abc", "extra={api_key: 'abc d', n: 3}", "proxy_auth=abc", "sampling.max_answer_tokens=96"]
    monkeypatch.setattr(sys, "argv", ["/bin/meml", *words])
    facts = {"note": "asked with hf_secret", "overrides": {"x.api_key": "abc", "x.key_from": "HF_TOKEN"}, "seed": 3}
    runs.write_manifest(RunFolder(tmp_path), **facts)
    text = (tmp_path / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["packages"]["torch"] and manifest["hardware"]["cores"] >= 1 and manifest["seed"] == 3
    assert manifest["command"] == "meml api_key=... 'extra={api_key: ..., n: 3}' proxy_auth=... sampling.max_answer_tokens=96"
    assert manifest["note"] == "asked with ..."
    assert manifest["overrides"] == {"x.api_key": "...", "x.key_from": "HF_TOKEN"}
    assert "hf_secret" not in text and "abc" not in text and "PATH" not in text
    runs.end_manifest(RunFolder(tmp_path), wall_s=2.5)
    ended = RunFolder(tmp_path).read_json("manifest")
    assert ended.pop("peak_memory_mib") > 10 and ended.pop("wall_s") == 2.5 and ended == manifest


def test_peak_memory_counts_a_child_that_was_larger_and_has_ended(tmp_path):
    runs.write_manifest(RunFolder(tmp_path))
    subprocess.run([sys.executable, "-c", "held = b'x' * (1200 << 20)"], check=True)
    runs.end_manifest(RunFolder(tmp_path))
    assert RunFolder(tmp_path).read_json("manifest")["peak_memory_mib"] >= 1200


def test_the_command_is_what_a_person_typed_also_below_meml_and_in_a_kernel(monkeypatch):
    monkeypatch.setenv(runs.COMMAND, "meml run params/demo.yaml")
    assert runs.command() == "meml run params/demo.yaml"
    monkeypatch.delenv(runs.COMMAND)
    code = "from meml_lib import runs; runs.in_kernel = lambda: True; print(runs.command())"
    starter = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    words = [sys.executable, "-c", starter, code, "--IdentityProvider.token=abc"]
    environment = os.environ | {"JPY_SESSION_NAME": "notebooks/02_mef.ipynb"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    if sys.platform == "linux":
        assert done.stdout.endswith(" --IdentityProvider.token=... notebooks/02_mef.ipynb\n")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository that runs.py takes for its own: write(name, text)."""
    here = tmp_path / "checkout"

    def write(name: str, text: str | bytes) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    for name in ("meml_lib/runs.py", "reports/demo/report.md", "params/demo.yaml"):
        write(name, "before\r\n \n")
    write(".gitignore", "__pycache__/\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(here), *words], check=True)
    monkeypatch.setattr(runs, "__file__", str(here / "meml_lib" / "runs.py"))
    monkeypatch.chdir(here / "params")
    write.here = here
    return write


def test_a_committed_report_written_anew_is_no_change_of_the_sources(checkout, tmp_path):
    checkout("reports/demo/report.md", "after\n")
    checkout("meml_lib/__pycache__/runs.pyc", b"\0")
    checkout("reports/mine/report.md", "new\n")
    checkout("scratch.txt", "new\n")
    assert runs.provenance()["dirty"] is False
    folder = RunFolder(tmp_path / "run")
    runs.write_manifest(folder)
    assert os.listdir(folder.path) == ["manifest.json"] and folder.read_json("manifest")["changes"] is None
    checkout("params/mine.yaml", "new\n")
    assert runs.provenance()["dirty"] is True


def test_the_commit_and_the_kept_changes_rebuild_the_code_that_ran(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "my-own-secret")
    subprocess.run(["git", "-C", str(checkout.here), "config", "diff.noprefix", "true"], check=True)
    checkout("params/demo.yaml", "after\r\n \n")
    checkout("meml_lib/new.py", b"latin \xe9\nkey = 'my-own-secret'\n")
    checkout("notebooks/binary", b"\0\1\2")
    (checkout.here / "meml_lib/runs.py").unlink()
    folder = RunFolder(tmp_path / "run")
    runs.write_manifest(folder)
    manifest = folder.read_json("manifest")
    again = tmp_path / "again"
    subprocess.run(["git", "clone", "-q", str(checkout.here), str(again)], check=True)
    subprocess.run(["git", "-C", str(again), "checkout", "-q", manifest["commit"]], check=True)
    subprocess.run(["git", "-C", str(again), "apply", str(folder.path / manifest["changes"])], check=True)
    assert not (again / "meml_lib/runs.py").exists()
    assert (again / "params/demo.yaml").read_bytes() == b"after\r\n \n"
    assert (again / "notebooks/binary").read_bytes() == b"\0\1\2"
    assert (again / "meml_lib/new.py").read_bytes() == b"latin \xe9\nkey = '...'\n"


def test_the_jobs_and_stages_of_a_study_share_its_patch_until_the_code_changes_again(checkout, tmp_path):
    checkout("meml_lib/runs.py", "after\n")
    places = ("study", "study/jobs/a", "study/runs/full/seed-0/stage2")
    study, job, stage = (RunFolder(tmp_path / place) for place in places)
    for folder in (study, job):
        runs.write_manifest(folder)
    name = study.read_json("manifest")["changes"]
    assert job.read_json("manifest")["changes"] == f"../../{name}" and os.listdir(job.path) == ["manifest.json"]
    checkout("meml_lib/runs.py", "later\n")
    runs.write_manifest(stage)
    other = stage.read_json("manifest")["changes"]
    assert (stage.path / other).read_text() != (study.path / name).read_text() and "/" not in other


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_ones_stays(tmp_path):
    folder = RunFolder(tmp_path)
    names = ("status.json.999999999", f"status.json.{os.getpid()}", "a.json.999999999")
    dead, alive, other = (tmp_path / f".{name}-x" for name in names)
    for file in (dead, alive, other):
        file.write_text("{")
    folder.set_status("done")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([alive.name, other.name, "status.json"])


def test_little_space_is_told_with_its_folder(tmp_path, monkeypatch):
    assert runs.little_space(tmp_path) == ""
    for free, told in ((4096, "4,096 bytes"), (3 * 2**20, "3 MiB")):
        monkeypatch.setattr(runs.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
        said = f"; the disk of {tmp_path}/new has only {told} left: make room on it"
        assert runs.little_space(tmp_path / "new", "; ") == said
