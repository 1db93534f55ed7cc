"""A model that the demo, cut short, trains, behind `transformers serve`: each expert answers as our own evaluation had it answer.

    .venv/bin/pip install -c constraints.txt -e '.[serving]'
    .venv/bin/python tests/publish_check.py

Trains both stages of the demo, long enough that answers are sentences, starts the server on a free port, asks every expert each
test question over HTTP, greedily, and compares with tables/test_greedy. Ends with 1 on any difference. Two minutes on 2 cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from pathlib import Path

from serve_check import serve

from meml_lib import config, tasks
from meml_lib.pipeline import launch
from meml_lib.runs import RunFolder

VALUES = {"mef.steps": 150, "riel.steps": 2, "evaluate.test_questions": 8, "evaluate.validation_questions": 8, "evaluate.samples_per_expert": 0}


def asked(port: int, model: str, system: str, question: str, tokens: int) -> str:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    told = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": tokens}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(told).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["message"]["content"].strip()


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        p = config.load_run("params/demo.yaml", VALUES, run_dir=Path(name) / "run")
        launch.train("mef", p)
        launch.train("riel", p)
        folder = RunFolder(p.folder("riel"))
        model, expected = folder.path / "model", folder.read_table("test_greedy").set_index(["question_id", "expert"])["text"]
        server, port = serve(model, Path(name))
        try:
            wrong = 0
            for question in tasks.load(p.task).questions("test")[: VALUES["evaluate.test_questions"]]:
                for expert in json.loads((model / "experts.json").read_text()):
                    said = asked(port, str(model), expert["system"], question.text, p.sampling.max_answer_tokens)
                    same = said == expected[question.id, expert["name"]]
                    wrong += not same
                    print(f"{question.id}, {expert['name']}: {'the same' if same else f'OTHER: {said!r}'} ({said[:60]}...)")
        finally:
            server.terminate()
            server.wait(30)
        print(f"{len(expected) - wrong} of {len(expected)} answers are those of the evaluation")
        return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
