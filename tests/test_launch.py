"""launch.train: what is trained again and why, what an interruption leaves, many processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import fake_stage
import pytest

from meml_lib import config, runs, training
from meml_lib.pipeline import keys, launch, outputs, processes
from meml_lib.runs import RunFolder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(overrides) -> a smoke run in a temporary folder; training is faked."""
    monkeypatch.setitem(sys.modules, launch.STAGE, None)
    monkeypatch.setattr(training, "stage", None, raising=False)
    monkeypatch.setenv(runs.HEADLESS, "1")
    fake_stage.install()
    return lambda *overrides: config.load_run("params/smoke.yaml", overrides, run_dir=tmp_path / "run")


def test_a_result_is_kept_until_a_value_that_it_reads_changes(run, capsys):
    metrics = launch.train("mef", run())
    assert metrics["step"].tolist() == [0, 1, 2, 3]
    assert "because nothing has run here yet" in capsys.readouterr().out
    for unread in ("riel.steps=9", "hardware.threads=2", "sampling.rows_per_batch=3"):
        assert launch.train("mef", run(unread)).equals(metrics)
        assert "mef: nothing to train" in capsys.readouterr().out
    assert len(launch.train("mef", run("mef.steps=2"))) == 2
    assert "because mef.steps: 4 -> 2" in capsys.readouterr().out
    old = RunFolder(run().folder("mef")).path.with_name("stage1.old")
    assert len(RunFolder(old).read_metrics()) == 4  # the last complete result is kept


def test_stage_2_follows_its_stage_1(run, capsys):
    with pytest.raises(FileNotFoundError, match="stage 1 in .* is absent .*train it first: notebook 02_mef"):
        launch.train("riel", run())
    launch.train("mef", run())
    launch.train("riel", run())
    with pytest.raises(RuntimeError, match="trained with other values .mef.steps: 4 -> 2.*train it again"):
        launch.train("riel", run("mef.steps=2"))
    launch.train("mef", run("mef.steps=2"))
    launch.train("riel", run("mef.steps=2"))
    assert "riel: nothing to train" in capsys.readouterr().out  # the same weights came out
    (run().folder("mef") / "model" / "model.safetensors").write_text("others")
    launch.train("riel", run("mef.steps=2"))
    assert "because stage1/model.safetensors changed" in capsys.readouterr().out


def test_a_damaged_result_is_made_again(run, capsys):
    launch.train("mef", run())
    RunFolder(run().folder("mef")).table("test_greedy").unlink()
    launch.train("mef", run())
    assert "test_greedy.parquet: missing" in capsys.readouterr().out
    assert not outputs.stage_faults("mef", run())


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_a_training_that_fails_says_so_and_the_next_call_starts_over(run, capsys, error):
    def broken(stage, p, on_record):
        on_record({"step": 0, "loss": 1.0})
        RunFolder(p.folder(stage)).append_metrics({"step": 0, "loss": 1.0})
        raise error

    fake_stage.install(broken)
    with pytest.raises(type(error)):
        launch.train("mef", run())
    assert RunFolder(run().folder("mef")).status["state"] == "failed"
    fake_stage.install()
    assert len(launch.train("mef", run())) == 4
    assert "the last training did not end well" in capsys.readouterr().out


def test_a_training_that_leaves_nothing_is_not_done(run):
    fake_stage.install(lambda stage, p, on_record: None)
    with pytest.raises(RuntimeError, match="results are not complete: .*metrics.jsonl: no step"):
        launch.train("mef", run())


def test_a_folder_with_files_of_somebody_else_is_left_alone(run):
    own = run().folder("mef") / "thesis.tex"
    own.parent.mkdir(parents=True)
    own.write_text("years of work")
    with pytest.raises(RuntimeError, match="holds files that no training wrote"):
        launch.train("mef", run())
    assert own.read_text() == "years of work"


def test_a_training_killed_at_its_very_start_or_while_it_cleared_up_goes_on(run):
    folder = run().folder("mef")
    folder.mkdir(parents=True)
    (folder / ".status.json.999999999-torn").write_text('{"sta')  # killed while it wrote its first file
    (folder.parent / ".stage1.gone" / "tables").mkdir(parents=True)  # or while it removed an incomplete result
    (folder.parent / ".stage1.gone" / "values.json").write_text("{}")
    assert len(launch.train("mef", run())) == 4
    assert [file.name for file in folder.parent.iterdir() if file.name not in ("stage1", ".stage1.lock")] == []
    assert not list(folder.glob(".*"))


def test_the_first_file_of_a_training_says_that_it_is_one(run, monkeypatch):
    written = []
    real = RunFolder.write_json

    def write(folder, name, value):
        written.append(name)
        return real(folder, name, value)

    monkeypatch.setattr(RunFolder, "write_json", write)
    launch.train("mef", run())
    assert written[0] == "status" and "values" in written


def test_the_port_that_an_accelerate_config_names_must_be_free(run, tmp_path):
    file = tmp_path / "accelerate.yaml"
    p = run("hardware.processes=2", f"hardware.accelerate_config={file}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        file.write_text(f"main_process_port: {port}\nmachine_rank: 0\n")
        with pytest.raises(OSError, match=f"accelerate.yaml: main_process_port={port} is in use"):
            launch.train("mef", p)
        assert RunFolder(p.folder("mef")).status["state"] == "absent"
        for other in (f"main_process_port: {port}\nmachine_rank: 1\n", "main_process_port: 0\n", "num_machines: 1\n"):
            file.write_text(other)
            launch._check_port(p)


def test_the_manifest_and_values_are_written(run):
    launch.train("mef", run("seed=5"))
    folder = RunFolder(run().folder("mef"))
    assert folder.read_json("manifest")["seed"] == 5
    assert config.load_values(folder.path / "values.json") == run("seed=5")


def test_nan_in_a_metric_or_an_infinite_number_in_a_table_is_a_fault(run):
    launch.train("mef", run())
    folder = RunFolder(run().folder("mef"))
    (folder.path / "metrics.jsonl").write_text('{"step": 0, "loss": NaN}\n')
    assert outputs.metrics_faults(folder) == [f"{folder.path}/metrics.jsonl: loss = nan at step 0"]
    good = folder.read_table("test_greedy")
    for name, second in (("tokens", float("inf")), ("tokens", float("nan")), ("text", None), ("logp", float("nan"))):
        first = "1" if name == "text" else 1.0
        values = [first, second, first]
        folder.write_table("test_greedy", good.assign(**{name: values}))
        fault = f"column {name}: 1 of 3 values are null, NaN or infinite, the first in row 2"
        assert outputs.table_faults(folder, "test_greedy", ["tokens", "text"])[0].endswith(fault)
    folder.write_table("test_greedy", good.assign(answer=None, correct=float("nan")))  # all unreadable
    assert not outputs.table_faults(folder, "test_greedy", ["answer", "correct", "text"])
    assert "no column gold" in outputs.table_faults(folder, "test_greedy", ["gold"])[0]
    folder.table("test_greedy").write_bytes(b"PAR1")
    assert "broken" in outputs.table_faults(folder, "test_greedy", [])[0]


# --- signs of trouble -------------------------------------------------------------------------------------------------


def troubled(stage, p, on_record):
    """A run whose reward rises while its buffer stays empty."""
    empty = {"buffer_flushes": 0, "buffer_size": 0, "groups_all_wrong": 0.0}
    fake_stage.run(stage, p, lambda record: on_record(record | empty | {"reward": record["step"] / 100}))


@pytest.mark.parametrize("watched", [False, True])
def test_a_sign_of_trouble_is_printed_once(run, capsys, monkeypatch, watched):
    if watched:  # at a terminal, above the bar
        monkeypatch.delenv(runs.HEADLESS)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    p = run("mef.steps=40", "riel.steps=40", "riel.objective.buffer_sft.capacity=9")
    launch.train("mef", p)
    fake_stage.install(troubled)
    launch.train("riel", p)
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if "sign of trouble" in line]
    assert ["at step 20, buffer never fills: at most 8" in line for line in lines] == [True]
    assert ("40/40" in shown.err) == watched
    assert ("riel step 40/40" in shown.out) != watched


# --- code -------------------------------------------------------------------------------------------------------------


def test_a_loss_of_stage_2_is_none_of_stage_1(run):
    mef, riel = (set(keys.stage_parts(stage, run())["code"]) for stage in ("mef", "riel"))
    assert {"training/losses.py: mutual_loss", "training/buffer.py: HardExampleBuffer"} <= riel - mef
    assert {"training/losses.py: mef", "training/mef.py: select", "training/stage.py: _mef"} <= mef - riel
    both = {"training/losses.py: weighted_nll", "tasks/wordproblems.py: WordProblems", "rollouts/native.py: sample"}
    assert both <= mef & riel
    files = {place.partition(":")[0] for place in mef | riel}
    assert not {"rollouts/vllm.py", "config.py", "schema.py", "tasks/gsm8k.py", "analysis/figures.py", "pipeline/launch.py"} & files


def test_a_data_file_is_an_input(tmp_path, run):
    file = tmp_path / "own.jsonl"
    file.write_text('{"question": "?", "answer": "1"}\n')
    task = {"name": "jsonl", "path": str(file), "answer": "number", "validation_share": 0.1, "test_share": 0.1}
    known = {"only": {"system": "answer", "teacher": {"kind": "derived", "style": "gold"}}}
    p = config.load_run("params/smoke.yaml", {"task": task | {"split_seed": 0}, "experts": {"panel": ["only"], "known": known}})
    before = keys.stage_parts("mef", p)
    file.write_text('{"question": "?", "answer": "2"}\n')
    assert keys.reasons(before, keys.stage_parts("mef", p)) == [f"{file} changed"]


def test_reasons_name_values_versions_code_and_inputs():
    old = {"values": {"a": 1, "b": 2}, "code": {"x.py": "1"}, "versions": {"torch": "2.12"}}
    new = {"values": {"a": 1, "b": None, "c": 3}, "code": {"x.py": "2"}, "versions": {"torch": "2.13"}}
    assert keys.reasons(old, old) == []
    assert keys.reasons({"values": {"x": "a" * 300}}, {"values": {"x": "a" * 299 + "b"}}) == [
        f'x: ...{"a" * 20}a"... -> ...{"a" * 20}b"...'
    ]
    assert keys.reasons(old, new) == ["b: 2 -> null", "c: absent -> 3", "x.py changed", 'torch: "2.12" -> "2.13"']


# --- processes --------------------------------------------------------------------------------------------------------


def test_code_edited_since_the_kernel_loaded_it_trains_in_a_process_of_its_own(run, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "_CODE_AT_IMPORT", {"training/losses.py": "older"})
    monkeypatch.setattr(launch, "_train_in_processes", lambda stage, p, folder, show, lock: seen.append(stage))
    with pytest.raises(RuntimeError, match="not complete"):
        launch.train("mef", run())
    assert seen == ["mef"]


WORKER = """
import os, sys
from meml_lib import config
from meml_lib.runs import RunFolder
p = config.load_values(sys.argv[2])
rank = os.environ.get("RANK", "0")
print("hello from", rank, flush=True)
if rank == "1" and p.seed == 13:
    raise ValueError("rank 1 broke")
if rank == "0":
    folder = RunFolder(p.folder(sys.argv[1]))
    folder.append_metrics({"step": 0, "loss": 0.5})
    folder.write_json("progress", {"steps": 1, "doing": "training"})
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "fake_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{config.root()}")
    monkeypatch.setattr(launch, "STAGE", "fake_worker")


def test_two_processes_are_watched_and_logged(run, worker, capsys):
    p = run("hardware.processes=2")
    folder = RunFolder(p.folder("mef"))
    folder.write_json("values", p.model_dump(mode="json"))
    shown = []
    launch._train_in_processes("mef", p, folder, shown.append)
    assert shown == [{"step": 0, "loss": 0.5}]
    assert capsys.readouterr().out == "hello from 0\n"
    logs = {file.parent.name: file.read_text() for file in (folder.path / "logs").glob("**/stdout.log")}
    assert logs == {"0": "hello from 0\n", "1": "hello from 1\n"}


@pytest.mark.parametrize(("machines", "gpus"), [(1, 0), (2, 0), (2, 8)])
def test_a_config_file_starts_cpu_processes_by_torchs_launcher_gpus_by_accelerates(run, tmp_path, monkeypatch, machines, gpus):
    monkeypatch.setattr(runs, "gpus", lambda: ["a GPU"] * gpus)
    file = tmp_path / "a.yaml"
    file.write_text(f"num_machines: {machines}\nnum_processes: 2\n")
    p = run("hardware.processes=2", "hardware.device=auto", f"hardware.accelerate_config={file}")
    if machines == 2 and not gpus:
        with pytest.raises(config.ParamsError, match="a.yaml: num_machines=2 must be 1 where there is no GPU"):
            launch._command(p, tmp_path, [])
    else:
        command = launch._command(p, tmp_path, [])
        assert ("torch.distributed.run" in command) is not bool(gpus)
        assert (str(file) in command) is bool(gpus)


def test_the_rank_that_failed_first_is_named(run, worker):
    p = run("hardware.processes=2", "seed=13")
    folder = RunFolder(p.folder("mef"))
    folder.write_json("values", p.model_dump(mode="json"))
    with pytest.raises(RuntimeError, match=r"rank 1 failed first(.|\n)*ValueError: rank 1 broke"):
        launch._train_in_processes("mef", p, folder, lambda record: None)


def test_ending_a_group_ends_grandchildren():
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    grandchild = int(process.stdout.readline())
    processes.end_group(process, patience_s=5)
    assert process.returncode != 0
    assert not _alive(grandchild)


def test_a_child_ends_with_a_parent_that_is_killed():
    code = (
        "import subprocess; from meml_lib.pipeline.processes import with_parent\n"
        "p = subprocess.Popen(['sleep', '60'], preexec_fn=with_parent()); print(p.pid, flush=True); p.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    until = time.monotonic() + 5
    while _alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(child)


def test_a_child_whose_parent_ended_before_it_could_ask_ends_at_once():
    code = "from meml_lib.pipeline.processes import end_with_parent\nend_with_parent({})\nprint('went on')"
    for parent, left in ((os.getpid(), (0, b"went on\n")), (os.getppid(), (-signal.SIGTERM, b""))):
        found = subprocess.run([sys.executable, "-c", code.format(parent)], stdout=subprocess.PIPE, check=False)
        assert (found.returncode, found.stdout) == left


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_second_sigterm_does_not_break_off_the_unwinding_of_the_first():
    code = "import os, signal; from meml_lib.pipeline import processes\nprocesses.sigterm_as_interrupt()\n"
    code += "def end(): os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "try:\n    end()\nexcept KeyboardInterrupt:\n    end()\n    print('unwound')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "unwound\n", "")


def test_sigterm_unwinds_a_training_as_ctrl_c_does_and_ends_the_process_elsewhere():
    code = "import os, signal; from meml_lib.pipeline import processes\ndef end(): os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "try:\n    with processes.sigterm_interrupts():\n        end()\n"
    code += "except KeyboardInterrupt:\n    print('unwound', flush=True)\n"
    code += "end()\nprint('went on')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (-signal.SIGTERM, "unwound\n")
