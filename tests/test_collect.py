"""Collecting: what is asked, what is stored, what each failure ends in. A real HTTP server plays the endpoint."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbclient
import nbformat
import pytest
import yaml
from faulty_server import FaultyServer
from typer.testing import CliRunner

from meml_lib import config, runs, schema, tasks
from meml_lib.cli import app
from meml_lib.experts import collect, store

ROOT = Path(__file__).parents[1]
KEY = "sk-planted-0123456789abcdef"


@pytest.fixture(autouse=True)
def headless(monkeypatch):
    monkeypatch.setenv(runs.HEADLESS, "1")


class World:
    """A run file with questions of its own, and one store for all teachers."""

    def __init__(self, folder: Path):
        self.folder, self.store = folder, folder / "store.jsonl"

    def write(self, url, questions=6, experts=("a",), teachers=None, **values) -> Path:
        """The run file. teachers: expert -> values of its teacher; values: dotted keys, __ for a dot."""
        self.questions = [f"What is {n} and {n}?" for n in range(questions)]
        rows = [{"id": f"q{n}", "question": q, "answer": "1", "split": "train"} for n, q in enumerate(self.questions)]
        rows.append({"id": "held", "question": "Another?", "answer": "1", "split": "validation"})
        (self.folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"name": "jsonl", "path": str(self.folder / "questions.jsonl"), "answer": "number"}
        known = {}
        for name in experts:
            teacher = {"kind": "api", "model": "m", "base_url": url, "key_from": None, "path": str(self.store)}
            own = (teachers or {}).get(name, {})
            known[name] = {"system": f"you are {name}", "teacher": teacher | {"max_answer_tokens": 20} | own}
        tree = {
            "use": ["smoke.yaml"],
            "task": task | {"validation_share": 0, "test_share": 0, "split_seed": 0},
            "experts": {"panel": list(experts), "known": known},
            "collect": {"concurrency": 4, "timeout_s": 30, "retries": 1},
        }
        tree["collect"] |= values
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    def run(self, url, overrides=(), **values) -> collect.Collected:
        tasks.load.cache_clear()  # the questions' file may be written anew
        return collect.run(config.load_run(self.write(url, **values), overrides, run_dir=self.folder / "run"))

    def answers(self) -> dict:
        """(expert, question_id, sample) -> text."""
        return {(r["expert"], r["question_id"], r["sample"]): r["text"] for r in collect.stored(str(self.store))}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def right(world, experts=("a",), samples=1) -> dict:
    return {
        (expert, f"q{n}", sample): f"It is\n#### {len(question)}"
        for expert in experts
        for n, question in enumerate(world.questions)
        for sample in range(samples)
    }


# --- what is asked and stored -----------------------------------------------------------------------------------------


def test_every_teacher_answers_every_training_question_once_and_a_second_run_asks_nothing(world):
    told = {"b": {"system": "be brief", "temperature": 0.5, "samples": 2, "extra": {"thinking": {"type": "enabled"}}}}
    with FaultyServer() as server:
        first = world.run(server.url, experts=("a", "b"), teachers=told)
        asked = server.log
        second = world.run(server.url, experts=("a", "b"), teachers=told)
        assert len(server.log) == len(asked) == 18
    assert world.answers() == right(world, ("a",)) | right(world, ("b",), samples=2)
    assert first.missing == second.missing == 0
    assert first.table["new"].tolist() == [6, 12] and second.table["before"].tolist() == [6, 12]
    assert second.table["new"].tolist() == second.table["requests"].tolist() == [0, 0]
    bodies = {tuple(sorted(request["body"])): request["body"] for request in asked}
    plain, rich = sorted(bodies.values(), key=len)
    assert plain["max_tokens"] == 20 and set(plain) == {"model", "messages", "max_tokens"}
    assert [message["role"] for message in plain["messages"]] == ["user"]
    assert rich["thinking"] == {"type": "enabled"} and rich["temperature"] == 0.5
    assert rich["messages"][0] == {"role": "system", "content": "be brief"}  # not "you are b"
    page = first._repr_html_()
    assert page.count("<tr") == 3 and ">18<" not in page and ">12<" in page


def test_a_line_holds_all_that_is_known_of_an_answer(world):
    price = {"a": {"price": {"input": 2.0, "output": 8.0}, "model": "r1", "api_model": "reasoner"}}
    with FaultyServer() as server:
        done = world.run(server.url, questions=1, teachers=price)
        assert server.log[0]["body"]["model"] == "reasoner"
    (record,) = collect.stored(str(world.store))
    assert list(record) == (
        "question_id expert sample asked text reasoning ended finish_reason model prompt_tokens answer_tokens cost seconds"
        " at values requests"
    ).split()
    assert record["cost"] == pytest.approx((10 * 2 + 5 * 8) / 1e6) and record["requests"] == 1
    assert (record["prompt_tokens"], record["answer_tokens"], record["ended"]) == (10, 5, True)
    assert record["model"] == "reasoner" and record["values"]["model"] == "reasoner" and 0 <= record["seconds"] < 30
    assert done.table.loc[0, "model"] == "r1" and done.table.loc[0, "cost"] == pytest.approx(60e-6)
    p = config.load_run(world.folder / "run.yaml")
    assert record["asked"] == collect.fingerprint(p.experts.known["a"].teacher, world.questions[0])


def test_null_in_extra_takes_a_field_out_of_the_request(world):
    newer = {"a": {"extra": {"max_tokens": None, "max_completion_tokens": 20}}}
    with FaultyServer() as server:
        world.run(server.url, questions=1, teachers=newer)
        body = server.log[0]["body"]
    assert "max_tokens" not in body and body["max_completion_tokens"] == 20


def test_reasoning_is_kept_apart_from_the_answer_and_a_cut_or_empty_answer_is_kept(world):
    kinds = ("think", "reasoning", "length", "empty", "answer", "no usage", "null usage")
    questions = [f"What is {n} and {n}?" for n in range(7)]
    with FaultyServer({q: [kind] for q, kind in zip(questions, kinds, strict=True)}) as server:
        assert world.run(server.url, questions=7).missing == 0
    by_kind = dict(zip(kinds, sorted(collect.stored(str(world.store)), key=lambda r: r["question_id"]), strict=True))
    assert {by_kind[kind]["reasoning"] for kind in ("think", "reasoning")} == {"let me count"}
    assert {by_kind[kind]["text"] for kind in ("think", "reasoning", "answer")} == {"It is\n#### 16"}
    assert not by_kind["length"]["ended"] and by_kind["length"]["finish_reason"] == "length"
    assert by_kind["empty"]["text"] == "" and by_kind["empty"]["ended"]
    for kind in ("no usage", "null usage"):
        assert by_kind[kind]["answer_tokens"] is None and by_kind[kind]["cost"] is None


# --- failures ---------------------------------------------------------------------------------------------------------


def test_each_passing_fault_is_retried_and_counted_and_no_good_answer_is_lost(world):
    questions = [f"What is {n} and {n}?" for n in range(10)]
    faults = [429, 500, 503, "drop", "half", "silence", "trickle"]
    with FaultyServer({q: [fault] for q, fault in zip(questions, faults, strict=False)}) as server:
        done = world.run(server.url, questions=10, concurrency=10, timeout_s=4)
        waited = [request["at"] for request in server.log if request["question"] == questions[0]]
        assert Counter(server.asked()) == {q: 1 + (n < len(faults)) for n, q in enumerate(questions)}
    assert world.answers() == right(world)
    assert waited[1] - waited[0] >= 1.0  # Retry-After: 1
    row = done.table.iloc[0]
    assert done.missing == 0 and (row["new"], row["requests"], row["failed"]) == (10, 17, "-")
    went_wrong = dict(part.split(": ") for part in row["went_wrong"].split(", "))
    assert went_wrong == {"HTTP 429": "1", "HTTP 500": "1", "HTTP 503": "1", "dropped connection": "2", "silence": "2"}


def test_what_finally_fails_is_counted_by_kind_not_stored_and_asked_again(world):
    questions = [f"What is {n} and {n}?" for n in range(9)]
    faults = [429, 500, 503, "drop", "half", "silence", "json", "no choice", 400]
    script = {q: [fault] * 2 if n < 6 else [fault] for n, (q, fault) in enumerate(zip(questions, faults, strict=True))}
    with FaultyServer(script) as server:
        done = world.run(server.url, questions=9, concurrency=9, timeout_s=3)
        assert done.missing == 9 and world.answers() == {}
        failed = "HTTP 429: 1, HTTP 500: 1, HTTP 503: 1, dropped connection: 2, silence: 1, bad reply: 2, HTTP 400: 1"
        assert sorted(done.table.loc[0, "failed"].split(", ")) == sorted(failed.split(", "))
        assert done.table.loc[0, "requests"] == 15  # 6 x 2 + 3: what is broken for good is not retried
        assert "HTTP 400: Error code: 400 - no: Bearer none" in str(done) and "bad reply: " in str(done)
        assert world.store.read_bytes() == b""  # a failure changes no input of a result
        again = world.run(server.url, questions=9)
    assert again.missing == 0 and world.answers() == right(world)
    assert again.table.loc[0, "new"] == 9


def test_a_refused_key_a_missing_model_and_another_model_stop_their_teacher_alone(world, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    with FaultyServer() as good, FaultyServer(always=401) as key, FaultyServer(always=404) as gone:
        with FaultyServer(always="model gpt-4o-mini") as other, FaultyServer(always=402) as poor:
            urls = {"ok": good.url, "key": key.url, "gone": gone.url, "other": other.url, "poor": poor.url}
            teachers = {name: {"base_url": url, "key_from": "SOME_KEY", "model": "gpt-4o"} for name, url in urls.items()}
            done = world.run("", questions=40, experts=tuple(urls), teachers=teachers, concurrency=4)
            assert max(len(server.log) for server in (key, gone, other, poor)) <= 4  # what was under way
    said = str(done)
    assert done.table.set_index("expert")["new"].to_dict() == {"ok": 40, "key": 0, "gone": 0, "other": 0, "poor": 0}
    assert done.missing == 160 and "the key in SOME_KEY was refused (HTTP 401)" in said and KEY not in said
    assert "knows no model 'gpt-4o'" in said and "nothing left to spend" in said
    assert "replies name the model 'gpt-4o-mini', not 'gpt-4o'" in said and "experts.known.other.teacher.replies_as" in said
    assert "gpt-4o-mini" in {record["model"] for record in collect.stored(str(world.store))}  # paid for, kept


def test_replies_of_another_name_count_once_it_is_said_that_they_are_meant(world):
    with FaultyServer(always="model ep-2026") as server:
        first = world.run(server.url, questions=4, concurrency=1)
        assert first.missing == 4 and len(server.log) == 1
        second = world.run(server.url, questions=4, teachers={"a": {"replies_as": "ep-2026"}})
        assert second.missing == 0 and len(server.log) == 4  # the stored one was not asked again


@pytest.mark.parametrize(
    ("asked", "named", "same"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o-2024-08-06", "gpt-4o", True),
        ("doubao-1-5-thinking-pro", "doubao-1-5-thinking-pro-250415", True),
        ("llama3", "llama3:latest", True),
        ("DeepSeek-R1", "deepseek-r1", True),
        ("m", None, True),
        ("m", "", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o", "gpt-4", False),
        ("gpt-4", "gpt-4-32k", False),
        ("deepseek-r1", "deepseek-v3", False),
    ],
)
def test_a_date_or_a_tag_is_the_same_model_and_another_size_is_not(world, asked, named, same):
    file = world.write("http://127.0.0.1:1/v1", teachers={"a": {"model": asked}})
    assert collect.accepted(config.load_run(file).experts.known["a"].teacher, {"model": named}) is same


def test_a_teacher_that_only_fails_stops_before_it_has_burnt_every_question(world):
    with FaultyServer(always=500) as server:
        done = world.run(server.url, questions=60, retries=0, concurrency=3)
        assert len(server.log) == 12  # 10 in a row, and the two that were under way
    assert done.missing == 60 and "too many failures in a row" in str(done)


def test_failures_among_answers_do_not_stop_a_teacher(world):
    refused = {f"What is {n} and {n}?": [400] for n in range(0, 40, 2)}
    with FaultyServer(refused) as server:
        done = world.run(server.url, questions=40, concurrency=1)
        assert len(server.log) == 40
    assert (done.table.loc[0, "new"], done.table.loc[0, "failed"]) == (20, "HTTP 400: 20")


# --- budgets ----------------------------------------------------------------------------------------------------------

PRICED = {"a": {"price": {"input": 10.0, "output": 100.0}}}


@pytest.mark.parametrize("faults", [[], [500]])
def test_a_budget_of_requests_counts_retries_and_is_never_exceeded(world, faults):
    with FaultyServer({f"What is {n} and {n}?": faults for n in range(30)}) as server:
        done = world.run(server.url, questions=30, budget={"requests": 9}, concurrency=3)
        assert len(server.log) == 9 and "the budget of requests is reached: requests 9 of 9 spent" in str(done)
        again = world.run(server.url, questions=30, budget={"requests": 9})
        assert len(server.log) == 9 and again.table.loc[0, "new"] == 0  # over all runs, failures included
        more = world.run(server.url, questions=30, budget={"requests": 12}, concurrency=1)
        assert len(server.log) == 12 and more.missing > 0


@pytest.mark.parametrize(
    ("unit", "bound", "one", "most"), [("tokens", 700, 15, 100), ("money", 0.02, 0.0006, 0.0028)], ids=["tokens", "money"]
)
def test_a_request_starts_only_if_its_longest_answer_fits(world, unit, bound, one, most):
    """An answer takes 15 tokens (60e-5 in money); the longest 64 + 15 of the prompt + 20 (79 x 10 + 20 x 100, over 1e6)."""
    with FaultyServer(delay_s=0.02) as server:
        done = world.run(server.url, questions=60, teachers=PRICED, budget={unit: bound}, concurrency=8)
        count = len(server.log)
    spent = count * one
    assert spent <= bound and spent + one + most > bound  # it goes on one at a time until the last fits no more
    assert f"the budget of {unit} is reached: {unit} " in str(done) and done.table.loc[0, "new"] == count < 60
    with FaultyServer() as server:
        world.run(server.url, questions=60, teachers=PRICED, budget={unit: bound})
        assert server.log == []


def test_a_budget_of_money_ends_though_sums_of_it_are_rounded():
    """0.1 + 0.2 - 0.1 - 0.2 is above 0: with nothing under way, nobody would ever wake what waits."""

    async def spend():
        budget = collect._Budget(schema.BudgetParams(requests=None, tokens=None, money=0.35), Counter())
        needs = [Counter(requests=1, money=0.1), Counter(requests=1, money=0.2)]
        for need in needs:
            await budget.hold(need)
        waiting = asyncio.create_task(budget.hold(Counter(requests=1, money=0.36)))
        for need in needs:
            await asyncio.sleep(0)
            assert not waiting.done()
            budget.settle(need, Counter(requests=1, money=0.01))
        with pytest.raises(collect._BudgetReached, match="money"):
            await asyncio.wait_for(waiting, 10)

    asyncio.run(spend())


def test_a_limit_in_extra_counts_in_what_a_request_spends_at_most(world):
    larger = {"a": {"extra": {"max_tokens": 900}}}
    with FaultyServer() as server:
        done = world.run(server.url, questions=2, teachers=larger, budget={"tokens": 700})
        assert server.log == [] and "the budget of tokens is reached" in str(done)


def test_money_needs_the_price_of_every_asked_teacher(world):
    file = world.write("http://127.0.0.1:1/v1", experts=("a", "b"), teachers=PRICED, budget={"money": 1.0})
    with pytest.raises(config.ParamsError, match=r"collect.budget.money needs experts.known.b.teacher.price"):
        config.load_run(file)


def test_a_budget_of_tokens_cannot_be_kept_where_replies_do_not_count_them(world):
    with FaultyServer(always="no usage") as server:
        done = world.run(server.url, questions=8, concurrency=1, budget={"tokens": 10**6})
    assert done.table.loc[0, "new"] == 1 and "do not say how many tokens" in str(done)


# --- stopping and starting again --------------------------------------------------------------------------------------


def child(file: Path, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "meml_lib.cli", "collect", str(file)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_points_nothing_stored_is_asked_again_and_nothing_is_lost(world, how):
    draw = random.Random(7)
    with FaultyServer(delay_s=0.02) as server:
        file = world.write(server.url, questions=40, experts=("a", "b"), concurrency=6)
        there, since = {}, 0
        for _ in range(3 if how is signal.SIGKILL else 1):
            process, after = child(file), draw.randint(8, 18)
            goal = server.answered + after
            server.on_answer = lambda answered, process=process, goal=goal: answered == goal and process.send_signal(how)
            process.wait(60)
            server.on_answer = None
            assert process.returncode == (-how if how is signal.SIGKILL else 130)
            time.sleep(0.1)  # a request that the killed process had sent may still arrive
            now = world.answers()
            assert there.items() <= now.items() and len(now) >= len(there) + after - 6 - 1
            there, since = now, repeated(server, there, since)
        done = child(file)
        out, err = done.communicate(timeout=60)
        assert done.returncode == 0, err
        repeated(server, there, since)
    assert world.answers() == right(world, ("a", "b")) and "all answers are stored" in out
    assert len(collect.stored(str(world.store))) == 80
    if how is signal.SIGTERM:  # what was under way is spent, and noted
        given_up = list(store.lines(store.failures(world.store)))
        assert 1 <= len(given_up) <= 6 and {record["failed"] for record in given_up} == {"interrupted"}
        assert 80 + sum(record["requests"] for record in given_up) == len(server.log)


def test_a_server_that_does_not_run_is_named_and_its_teacher_stops(world):
    with FaultyServer() as server:
        teachers = {"b": {"base_url": "http://127.0.0.1:9/v1"}}  # the discard port: nobody listens
        done = world.run(server.url, experts=("a", "b"), teachers=teachers, concurrency=1, retries=0)
    assert done.table["new"].tolist() == [6, 0] and done.table["requests"].tolist()[1] == 1
    (stopped,) = (line for line in done.messages if "stopped" in line)
    assert stopped.startswith("b stopped: http://127.0.0.1:9/v1: ") and stopped.endswith("; does the server run?")
    assert done.table["failed"].tolist() == ["-", "no connection: 1"] and repr(done) == str(done)


def test_two_spellings_of_a_path_are_one_store(world):
    spelled = {"b": {"path": str(world.folder / "x" / ".." / "store.jsonl")}}
    (world.folder / "x").mkdir()
    with FaultyServer() as server:
        world.run(server.url, experts=("a", "b"), teachers=spelled)
        done = world.run(server.url, ["collect.budget.requests=12"], experts=("a", "b"), teachers=spelled)
        assert len(server.log) == 12 and done.missing == 0
        done = world.run(server.url, ["collect.budget.requests=13"], experts=("a", "b"), teachers=spelled, questions=7)
    assert done.missing == 1  # 12 were spent, not 24: one more fits


def repeated(server, there, since) -> int:
    """Both experts ask alike, so that a question whose two answers are stored must not arrive again."""
    ids = {question: f"q{n}" for n, question in enumerate(dict.fromkeys(f"What is {n} and {n}?" for n in range(40)))}
    log = list(server.log)
    arrived = Counter(request["question"] for request in log[since:])
    for question, count in arrived.items():
        assert count <= 2 - sum((expert, ids[question], 0) in there for expert in ("a", "b")), question
    return len(log)


def test_a_torn_last_line_is_cut_off_said_and_asked_again_and_readers_skip_it(world, capsys):
    with FaultyServer() as server:
        world.run(server.url)
        whole = world.store.read_bytes()
        world.store.write_bytes(whole[:-30])
        assert len(collect.stored(str(world.store))) == 5
        done = world.run(server.url)
        assert len(server.log) == 7
    torn = len(whole.splitlines(keepends=True)[-1]) - 30
    assert f"last line was torn ({torn} bytes)" in capsys.readouterr().out
    assert done.table.loc[0, "new"] == 1 and world.answers() == right(world)
    assert all(json.loads(line) for line in world.store.read_text().splitlines())


@pytest.mark.parametrize("content", [b"", b"torn", b"x" * 200_000, b"{}\n" + b"y" * 200_000, b"{}\n{}\n"])
def test_only_what_follows_the_last_newline_is_cut(tmp_path, content):
    (tmp_path / "s").write_bytes(content)
    opened = store.Store(tmp_path / "s")
    opened.close()
    assert (tmp_path / "s").read_bytes() == content[: content.rfind(b"\n") + 1]
    assert opened.torn == len(content) - content.rfind(b"\n") - 1


@pytest.mark.parametrize("line", ["secret stuff", "{}", "[1]", '{"question_id": "secret"}'])
def test_a_broken_line_is_an_error_that_names_its_place_and_does_not_show_it(world, line):
    world.store.write_text('{"text": "a", "expert": "z", "question_id": "q", "sample": 0, "asked": ""}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"store.jsonl:2 is no record") as error:
        collect.stored(str(world.store))
    assert "secret" not in str(error.value)


def test_a_changed_value_is_said_before_the_questions_are_asked_anew_and_the_old_answers_stay(world, capsys):
    with FaultyServer() as server:
        world.run(server.url, experts=("a", "b"))
        other = {"a": {"temperature": 0.7, "system": "now"}, "b": {"price": {"input": 1, "output": 1}}}
        capsys.readouterr()
        done = world.run(server.url, experts=("a", "b"), teachers=other)
        assert len(server.log) == 12 + 6
    said = capsys.readouterr().out
    assert "a: 6 stored answers are not used and are asked anew, because of another value of system, temperature" in said
    assert "b: " not in said  # a price changes no answer
    assert done.table["before"].tolist() == [0, 6] and len(collect.stored(str(world.store))) == 18
    lines = (world.folder / "questions.jsonl").read_text().replace("What is 0 and 0?", "What is 0 plus 0?")
    p = config.load_run(world.folder / "run.yaml", run_dir=world.folder / "run")
    (world.folder / "other.jsonl").write_text(lines)
    p = config.load_run(world.folder / "run.yaml", {"task.path": str(world.folder / "other.jsonl")})
    with FaultyServer() as server:
        teachers = {name: {"teacher": {"base_url": server.url}} for name in "ab"}
        p = config.load_run(
            world.folder / "run.yaml", {"task.path": str(world.folder / "other.jsonl"), "experts.known": teachers}
        )
        collect.run(p)
        assert server.asked() == ["What is 0 plus 0?"] * 2
    assert "1 stored answers are not used and are asked anew, because of another value of the question's text" in (
        capsys.readouterr().out
    )


def test_a_second_collector_into_the_same_file_is_refused(world):
    with FaultyServer() as server:
        file = world.write(server.url)
        with runs.locked(world.folder / ".store.jsonl.lock", "it"):
            with pytest.raises(runs.InUse, match=f"store.jsonl is in use by process {os.getpid()}"):
                collect.run(config.load_run(file))
            result = CliRunner().invoke(app, ["collect", str(file)])
            assert result.exit_code == 1 and "in use by process" in result.stderr
        assert server.log == []


def test_an_answer_counts_as_stored_only_after_it_is_on_the_disk(world, monkeypatch):
    """What the run holds to be new was synced; a disk that fails ends the run with its own error."""
    synced = []
    sync = os.fsync
    monkeypatch.setattr(store.os, "fsync", lambda handle: (sync(handle), synced.append(world.store.read_bytes().count(b"\n"))))
    counted = collect._Collecting._count

    def count(self, teacher, record):
        assert teacher.new < synced[-1]
        counted(self, teacher, record)

    monkeypatch.setattr(collect._Collecting, "_count", count)
    with FaultyServer() as server:
        assert world.run(server.url, questions=30).missing == 0

        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(store.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            world.run(server.url, questions=40)


def test_no_more_than_the_concurrency_is_under_way_and_all_of_it_is_used(world):
    with FaultyServer(delay_s=0.1) as server:
        world.run(server.url, questions=40, experts=("a", "b"), concurrency=7)
        assert server.most_at_once == 7


# --- keys -------------------------------------------------------------------------------------------------------------


def everything(folder: Path) -> str:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return "".join(f"{file}\n{file.read_bytes().decode(errors='replace')}" for file in files)


ECHOES = {f"What is {n} and {n}?": [met] for n, met in enumerate(["echo", 500, 400, "model KEY", 401])}


def test_a_key_reaches_no_file_message_or_log_though_the_server_echoes_it(world):
    with FaultyServer(ECHOES) as server:
        file = world.write(server.url, questions=5, teachers={"a": {"key_from": "PLANTED_KEY"}}, concurrency=5)
        done = child(file, PLANTED_KEY=KEY, OPENAI_LOG="debug")
        out, err = done.communicate(timeout=60)
        assert server.log[0]["key"] == f"Bearer {KEY}"
    assert done.returncode == 1 and "PLANTED_KEY was refused" in out and "[PLANTED_KEY]" in world.store.read_text()
    assert "HTTP Response" in err  # the client's own log was on
    assert KEY not in out + err + everything(world.folder)
    assert any("[PLANTED_KEY]" in text for text in world.answers().values())


def test_a_key_reaches_no_notebook(world, monkeypatch):
    """An executed notebook, with the kernel's running event loop; a wrong key and an unset one."""
    cells = [
        "from meml_lib import config\nfrom meml_lib.experts import collect\np = config.load_run(FILE)",
        "done = collect.run(p)\ndone",
        "print(done)",
        "collect.run(config.load_run(FILE, ['experts.known.a.teacher.key_from=NOT_SET_KEY']))",
    ]
    with FaultyServer(ECHOES) as server:
        file = world.write(server.url, questions=5, teachers={"a": {"key_from": "PLANTED_KEY"}}, concurrency=1)
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell.replace("FILE", repr(str(file)))) for cell in cells]
        )
        monkeypatch.setenv("PLANTED_KEY", KEY)
        monkeypatch.chdir(ROOT)
        nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120, allow_errors=True).execute()
        assert server.log[0]["key"] == f"Bearer {KEY}"
    nbformat.write(notebook, world.folder / "executed.ipynb")
    shown = (world.folder / "executed.ipynb").read_text()
    assert "replies_as" in shown and "<table" in shown and "the environment variable NOT_SET_KEY is not set" in shown
    assert KEY not in everything(world.folder)


def test_a_key_that_is_not_set_is_named_and_a_full_store_needs_none(world, monkeypatch):
    needs = {"a": {"key_from": "PLANTED_KEY"}}
    monkeypatch.delenv("PLANTED_KEY", raising=False)
    with FaultyServer() as server:
        with pytest.raises(config.ParamsError, match=r"a.teacher.key_from: the environment variable PLANTED_KEY is not set"):
            world.run(server.url, teachers=needs)
        monkeypatch.setenv("PLANTED_KEY", f"{KEY}\nx")
        with pytest.raises(config.ParamsError, match="PLANTED_KEY holds characters that no key has") as error:
            world.run(server.url, teachers=needs)
        assert KEY not in str(error.value) and server.log == []
        monkeypatch.setenv("PLANTED_KEY", f"{KEY}\n")
        assert world.run(server.url, teachers=needs).missing == 0
        monkeypatch.delenv("PLANTED_KEY")
        assert world.run(server.url, teachers=needs).missing == 0 and len(server.log) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        f"experts.known.a.teacher.key_from={KEY}",
        f"experts.known.a.teacher.api_key={KEY}",
        f"experts.known.a.teacher.key_from=[{KEY}]",
        f"experts.known.a.teacher={KEY}",
        f"experts.known.a.teacher.base_url=https://me:{KEY}@127.0.0.1/v1",
        f"experts.known.a.teacher.base_url=https://127.0.0.1/v1?key={KEY}",
        f"experts.known.a.teacher.key_from: {KEY}",
        f"experts.known.a.teacher.key_from='{KEY}",
        f"experts.known.a.teacher.key_from {KEY}",
    ],
)
@pytest.mark.parametrize("command", ["check", "collect"])
def test_a_key_put_where_a_value_belongs_is_refused_and_not_shown(world, command, wrong, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = world.write("http://127.0.0.1:1/v1")
    result = CliRunner().invoke(app, [command, str(file), "--set", wrong])
    assert result.exit_code == 2 and result.stderr
    assert KEY not in result.output + result.stderr
    if "=" in wrong and wrong.count("=") == 1 and "'" not in wrong:  # the same in a file
        key, value = wrong.split("=", 1)
        tree = yaml.safe_load(file.read_text())
        node = tree["experts"]["known"]["a"]
        parts = key.split(".")[3:]
        for part in parts[:-1]:
            node = node[part]
        node[parts[-1]] = yaml.safe_load(value)
        file.write_text(yaml.safe_dump(tree))
        result = CliRunner().invoke(app, [command, str(file)])
        assert result.exit_code == 2 and KEY not in result.output + result.stderr


def test_doctor_says_which_keys_are_set_by_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    monkeypatch.delenv("ARK_API_KEY", raising=False)
    said = CliRunner().invoke(app, ["doctor"]).output
    assert "keys     ARK_API_KEY -, DEEPSEEK_API_KEY set" in said and KEY not in said


# --- progress, speed --------------------------------------------------------------------------------------------------


def test_a_line_says_how_far_how_fast_what_it_costs_and_how_long_it_will_take(world, monkeypatch, capsys):
    monkeypatch.setattr(runs, "LOG_EVERY_S", 0.1)
    with FaultyServer(delay_s=0.6) as server:
        world.run(server.url, questions=16, teachers=PRICED, concurrency=4)
    line = r"collect answer (\d+)/16, [\d.]+ (?:answers/s|s/answer), \d:\d\d:\d\d left, cost ([\d.]+), about ([\d.]+) in all"
    told = [tuple(map(float, found)) for found in re.findall(line, capsys.readouterr().out)]
    assert told
    for there, cost, whole in told:  # four may have been paid for and not be on the disk yet
        assert 0.0006 * there <= cost + 1e-9 <= 0.0006 * (there + 4) + 2e-9
        assert whole == pytest.approx(cost * 16 / there, rel=0.01)


def test_what_is_said_goes_through_no_counter_that_another_thread_changes(world):
    class Changing(Counter):
        def items(self):
            raise RuntimeError("dictionary changed size during iteration")

    p = config.load_run(world.write("http://127.0.0.1:1/v1"))
    teacher = collect._Teacher("a", p.experts.known["a"].teacher, asked=4, new=2, spent=Changing(tokens=30))
    collecting = collect._Collecting(p, [], [])
    collecting.teachers = [teacher]
    assert collecting.standing() == "30 tokens, about 60 tokens in all"


def test_a_person_sees_a_bar(world, monkeypatch, capsys):
    monkeypatch.delenv(runs.HEADLESS)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with FaultyServer() as server:
        world.run(server.url)
    shown = capsys.readouterr()
    assert "6/6" in shown.err and "90 tokens" in shown.err and "collect 6/6" not in shown.out


def test_a_study_asks_the_teachers_of_its_arms_too(world):
    with FaultyServer() as server:
        world.write(server.url, experts=("a",))
        arm = {"experts.known.a.teacher.temperature": 0.5}
        arms = {"one": {"label": "one"}, "two": {"label": "two", "overrides": arm}}
        study = {"title": "t", "run_file": str(world.folder / "run.yaml"), "seeds": [0, 1], "arms": arms}
        (world.folder / "study.yaml").write_text(yaml.safe_dump(study))
        result = CliRunner().invoke(app, ["collect", str(world.folder / "study.yaml")])
        assert result.exit_code == 0 and "all answers are stored" in result.output
        assert Counter(request["body"].get("temperature") for request in server.log) == {None: 6, 0.5: 6}


def test_a_run_without_api_teachers_asks_nobody():
    result = CliRunner().invoke(app, ["collect", str(ROOT / "params" / "smoke.yaml")])
    assert result.exit_code == 0 and "no teacher of kind: api to ask" in result.output
    done = collect.run(config.load_run("params/smoke.yaml"))
    assert done.missing == 0 and done.table.empty


SPEED = """
import resource, sys, time
from meml_lib import config
from meml_lib.experts import collect
small, large = (config.load_run(file) for file in sys.argv[1:])
collect.run(small)
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
busy = time.process_time()
done = collect.run(large)
print(done.missing, time.monotonic() - started, time.process_time() - busy, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.alone
def test_2000_answers_that_take_200_ms_each_arrive_in_seconds_with_flat_memory(tmp_path):
    """64 at a time: 6.25 s if nothing else took time. `-s` shows what it took here: 10 s on a quiet machine, 16 on a slow one."""
    server = [sys.executable, str(ROOT / "tests" / "faulty_server.py"), "0.2"]
    with subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        url, files = process.stdout.readline().strip(), []
        for count in (200, 2000):
            world = World(tmp_path / str(count))
            world.folder.mkdir()
            files.append(str(world.write(url, questions=count, concurrency=64)))
        command = [sys.executable, "-c", SPEED, *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        process.stdin.close()
    assert done.returncode == 0, done.stderr
    missing, wall, busy, grown = (float(word) for word in done.stdout.splitlines()[-1].split())
    print(f"\n2,000 answers: {wall:.2f} s (ideal 6.25), processor {busy:.2f} s, memory +{grown / 1024:.1f} MiB over 200")
    assert missing == 0 and len(world.answers()) == 2000
    assert busy < 15 and wall < 4 * 6.25  # the processor's share tells what a quiet machine would take
    assert grown < 24 * 1024  # KiB


def test_the_api_preset_asks_the_papers_teachers_in_the_papers_order():
    from meml_lib.analysis import claims

    panel = config.load_run(ROOT / "params" / "gsm8k-api.yaml").experts
    gold, *others = (panel.known[name].teacher for name in panel.panel)
    assert [gold.style, *(teacher.model for teacher in others)] == claims.values()["teachers"]
    assert all(teacher.price and teacher.key_from for teacher in others)
