"""A study's report: first the numbers (`gather`), then what people read (`write`): Markdown, one HTML file, figures.

Every number comes from the tables and metrics in the run folders, with its interval, the number of questions and the
seeds that it rests on. What has not run is listed as not run. In a notebook `compare` sets one run beside the paper.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from meml_lib import config, runs
from meml_lib.analysis import claims, figures, latex, measures, overlap, readable, signs, stats
from meml_lib.analysis.measures import STAGES, ArmResult
from meml_lib.analysis.readable import tables
from meml_lib.runs import RunFolder

Papers = dict[str, tuple[str, pd.DataFrame]]  # table of the paper -> (its title, its rows)
Pictures = dict[str, tuple[str, figures.Picture]]  # name -> (caption, picture)
MOST_DRAWN = 7  # arms: as many as there are colours


# --- one run, in a notebook -------------------------------------------------------------------------------------------


def compare(p: config.Run, paper: str = "table-4", teachers: pd.DataFrame | None = None) -> pd.DataFrame:
    """paper | ours, interval, n, seeds | difference: the rows of a table of the paper that this run belongs to.

    Args: teachers: the answers of the run's own teachers, as one whole panel; None: those that stage 1 was trained on, if
      it has run.
    Raises: ValueError for a table that paper.yaml does not have.
    """
    arm, folder = measures.of_run(p), RunFolder(p.folder("mef"))
    if teachers is not None:
        arm.full_panel = arm.panel
    elif folder.table("teacher_answers").is_file():
        teachers = folder.read_table("teacher_answers")
    rows = claims.rows(paper, [arm], [] if teachers is None else [_teachers(arm.panel, teachers)])
    return pd.DataFrame(claims.readable(row for row in rows if row["arm"]))


def run_tables(p: config.Run) -> dict[str, pd.DataFrame]:
    """One run's measures after each stage that is done, and how its stage 2 trained: as `tables` of a study."""
    return readable.measured(_of_run(p))


def run_picture(p: config.Run) -> figures.Picture:
    """Accuracy of each expert of one run, before and after stage 2."""
    scores = _each_expert(_of_run(p))
    note = f"n = {scores['n_questions'].max():g} test questions, one seed; 95 % intervals (questions random)"
    return figures.before_after(scores, order=list(p.experts.known), note=note)


def _of_run(p: config.Run) -> dict[str, Any]:
    """What `gather` finds of a study, as far as one run has it."""
    arm, stage2 = measures.of_run(p), RunFolder(p.folder("riel"))
    trained = _training(stage2.read_metrics()) if stage2.status["state"] == "done" else None
    stage = {"stage": STAGES["riel"], "name": arm.arm, "label": arm.label, "state": "done", "training": trained}
    return _plain({"seeds": [p.seed], "arms": [_arm(arm, arm.arm, {})], "scores": arm.scores(), "stages": [stage]})


# --- the numbers of a study -------------------------------------------------------------------------------------------


def gather(study: config.Study, code: runs.Tree | None = None) -> dict[str, Any]:
    """All numbers of a study's report, as plain JSON values: report.json.

    Arms stand in the order of the paper's tables that they belong to; what shares stage 1 has its scores once.

    Args: code: what writes the report; None: as git knows it now.
    """
    found = [measures.of_arm(study, name) for name in study.arms]
    results = sorted(found, key=lambda result: max(claims.tables_of(result), default="table-9"))
    speaks: dict[str, str] = {}  # arm -> where the scores of its stage 1 stand: under an arm that ends there, if any
    for arms in study.stage1_groups().values():
        speaks |= dict.fromkeys(arms, max(arms, key=lambda arm: study.arms[arm].last_stage == "mef"))
    fullest, base, here = _fullest(results), study.base_run(), code or runs.tree()
    teachers = [_teachers(panel, folder.read_table("teacher_answers")) for panel, _, folder in _answered(study)]
    scores = [score for result in results for score in result.scores()]
    data = {
        "title": study.title,
        "notes": study.notes,
        "params_file": study.params_file,
        "run_file": study.run_params_file,
        "command": command(study),
        "commit": {"commit": here.commit, "dirty": here.dirty, "changes": None},
        "seeds": study.seeds,
        "values": base.values(),
        "panel": base.experts.panel,
        "arms": [_arm(result, speaks[result.arm], study.arms[result.arm].overrides) for result in results],
        "scores": [s for s in scores if s["stage"] == STAGES["riel"] or speaks[s["arm"]] == s["arm"]],
        "pairs": _pairs(study, {result.arm: result for result in results}),
        "teachers": teachers,
        "prompts": _prompts(study),
        "example": _example(results, study),
        "paper": [row for table in claims.values()["tables"] for row in claims.rows(table, results, teachers)],
        "settings": {"arm": fullest.label, "rows": claims.settings(fullest.run)},
        "stages": [_stage(study, *place) for place in _stages(study, [result.arm for result in results])],
    }
    machines: list[dict[str, Any]] = []
    for stage in data["stages"]:
        machine = {key: stage.pop(key) for key in ("python", "packages", "hardware")}
        if stage["state"] == "done" and machine not in machines:
            machines.append(machine)
        stage["machine"] = machines.index(machine) if machine in machines else None
    return _plain(data | {"machines": machines})


def _arm(result: ArmResult, stage1: str, differs: Mapping[str, Any]) -> dict[str, Any]:
    """stage1: the arm under which the scores of its stage 1 stand."""
    seeds = result.validation.get(result.last)
    head = {"arm": result.arm, "label": result.label, "experts": result.panel, "stage1": stage1}
    head |= {"last_stage": "mef" if result.last == STAGES["mef"] else "riel"}
    head |= {"kind": claims.kind(result), "validation": float(np.mean(list(seeds.values()))) if seeds else None}
    return {**head, "tables": claims.tables_of(result), "differs": differs}


def _pairs(study: config.Study, results: Mapping[str, ArmResult]) -> Iterator[dict[str, Any]]:
    """The differences that the study names. Holm's correction is over all of a table's, those to come included."""
    ordered = sorted(study.comparisons, key=lambda c: (not c.table.startswith("table-"), c.table))  # the paper's first
    for table, comparisons in groupby(ordered, lambda comparison: comparison.table):
        found = [(c, measures.paired(results[c.arm], results[c.against], c.measure)) for c in comparisons]
        corrected = stats.holm([difference and difference.p for _, difference in found])
        for (c, difference), p_holm in zip(found, corrected, strict=True):
            head = {"table": table, "arm": results[c.arm].label, "against": results[c.against].label}
            numbers = asdict(difference) if difference else {"mean": None}
            yield {**head, "measure": c.measure, **numbers, "p_holm": p_holm}


def command(study: config.Study) -> str:
    """The command line that makes this study."""
    given = study.overrides_of(None, study.seeds[0])
    extra = {k: v for k, v in given.items() if k != "seed" and (k not in study.overrides or study.overrides[k] != v)}
    words = [f"--set '{key}={json.dumps(value)}'" for key, value in {"seeds": list(study.seeds), **extra}.items()]
    return " ".join(["meml run", study.params_file, *words])


def _stages(study: config.Study, arms: Sequence[str]) -> Iterator[tuple[str, str, int, config.Stage]]:
    """(name, arm that speaks for it, seed, stage): stage 1 once for the arms that share it."""
    for group, members in study.stage1_groups().items():
        yield from ((group, members[0], seed, "mef") for seed in study.seeds)
    for arm in arms:
        if study.arms[arm].last_stage == "riel":
            yield from ((arm, arm, seed, "riel") for seed in study.seeds)


def _stage(study: config.Study, name: str, arm: str, seed: int, stage: config.Stage) -> dict[str, Any]:
    """One stage: its state ("not run" without a folder), what it was made with, how stage 2's training went."""
    run = study.run(arm, seed)
    folder = RunFolder(run.folder(stage))
    state, message = folder.status["state"], folder.status["message"]
    done, path = state == "done", folder.path.relative_to(study.folder)
    manifest = folder.read_json("manifest") if done else {}
    keys = ("commit", "dirty", "changes", "python", "packages", "hardware", "wall_s", "peak_memory_mib", "inputs")
    made = {key: manifest.get(key) for key in keys} | {"model_kept": any(folder.path.glob("model/*.safetensors"))}
    made["changes"] = made["changes"] and os.path.normpath(path / made["changes"])
    label = study.arms[arm].label if stage == "riel" else readable.stage1_label(run.experts.panel)
    head = {"name": name, "label": label, "seed": seed, "stage": STAGES[stage], "folder": str(path)}
    facts = {"state": "not run" if state == "absent" else state, "message": message, "training": None, "signs": []}
    if done and stage == "riel":
        limits = {name: most for name, most in run.riel.stop_at if most is not None}
        metrics = folder.read_metrics()
        facts["training"] = _training(metrics) | {"stop_at": limits}
        facts["signs"] = [asdict(sign) for sign in signs.replay(metrics.to_dict("records"), run.riel)]
    return {**head, **facts, **made}


def _training(metrics: pd.DataFrame) -> dict[str, Any]:
    """Shares in the first and last tenth of the steps, steps in which each loss had rows to train on, budgets."""
    tenth = max(1, len(metrics) // 10)
    ends = {"start": metrics.head(tenth), "end": metrics.tail(tenth)}
    rows = [column for column in metrics if column.startswith("rows/")]
    return {
        "steps": len(metrics),
        **{f"{name}_{end}": part[name].mean() for name in readable.SHARES for end, part in ends.items()},
        "steps_with_gradient": {column.removeprefix("rows/"): (metrics[column] > 0).sum() for column in rows},
        "buffer_flushes": metrics["buffer_flushes"].max(),
        **{name: metrics[name].iloc[-1] if name in metrics else None for name in readable.BUDGETS},
    }


def _stage1_folders(study: config.Study, table: str) -> Iterator[tuple[list[str], int, RunFolder]]:
    """(panel, seed, folder) of each finished stage 1 of several experts that has a table."""
    for members in study.stage1_groups().values():
        for seed in study.seeds:
            run = study.run(members[0], seed)
            folder = RunFolder(run.folder("mef"))
            if len(run.experts.panel) > 1 and folder.table(table).is_file():
                yield list(run.experts.panel), seed, folder


def _answered(study: config.Study) -> list[tuple[list[str], int, RunFolder]]:
    """As _stage1_folders, of the first seed: the teachers' answers are the same for every seed."""
    groups = groupby(_stage1_folders(study, "teacher_answers"), lambda found: found[2].path.parents[1])
    return [next(of_group) for _, of_group in groups]


def _teachers(panel: Sequence[str], answers: pd.DataFrame) -> dict[str, Any]:
    """How far the teachers' errors overlap, on the questions that all of them answered."""
    common = overlap.answered_by_all(answers)
    left_out = answers["question_id"].nunique() - common["question_id"].nunique()
    tables = {"accuracy": overlap.accuracy, "corrected": overlap.corrected_by_others, "shared": overlap.shared_errors}
    rows = {name: table(common).to_dict("records") for name, table in tables.items()}
    return {"experts": list(panel), "left_out": left_out, **rows}


def _prompts(study: config.Study) -> Iterator[dict[str, Any]]:
    """How often each prompt makes its own teacher's answer the likeliest, after stage 1."""
    for panel, seed, folder in _stage1_folders(study, "prompt_teacher"):
        table = folder.read_table("prompt_teacher")
        nats = overlap.nats_per_token(table).groupby(level="prompt").mean().to_dict("index")
        of = {"experts": panel, "seed": seed, "split": table["split"].iloc[0]}
        for row in overlap.own_teacher_likeliest(table).to_dict("records"):
            yield {**of, "nats_per_token": nats[row["prompt"]], **row}


def _fullest(results: Sequence[ArmResult]) -> ArmResult:
    """Most experts, then most losses: it stands for all where one arm is shown."""
    losses = {r.arm: sum(loss is not None for _, loss in r.run.riel.objective) for r in results}
    return max(results, key=lambda r: (r.last, len(r.panel), losses[r.arm]))


def _example(results: Sequence[ArmResult], study: config.Study) -> dict[str, Any] | None:
    """The fullest finished arm's answers to the first test question on which stage 1's experts disagree."""
    finished = [result for result in results if set(STAGES.values()) <= result.seeds.keys()]
    if not finished:
        return None
    shown = _fullest(finished)
    seed = shown.seeds["stage 2"][0]
    folders = {name: RunFolder(study.run(shown.arm, seed).folder(stage)) for stage, name in STAGES.items()}
    right = overlap.right_table(folders["stage 1"].read_table("test_greedy"))
    chosen = right.index[int(right.nunique(axis=1).gt(1).to_numpy().argmax())]
    answers = []
    for name, folder in folders.items():
        table = folder.read_table("test_greedy").query("question_id == @chosen")
        answers += table.assign(stage=name)[["expert", "stage", "text", "answer", "correct"]].to_dict("records")
    question = folders["stage 2"].read_table("test_questions").set_index("question_id").loc[chosen, ["text", "gold"]]
    head = {"arm": shown.arm, "label": shown.label, "seed": seed, "question_id": chosen}
    return {**head, **question.to_dict(), "answers": answers}


def _plain(value: Any) -> Any:
    """JSON values: numpy's numbers as Python's, NaN and NA as null."""

    def as_json(other: Any) -> Any:
        return list(other) if isinstance(other, Iterator) else None if other is pd.NA else other.item()

    return json.loads(json.dumps(value, default=as_json), parse_constant=lambda nan: None)


# --- pictures ---------------------------------------------------------------------------------------------------------


def pictures(study: config.Study, data: Mapping[str, Any]) -> dict[str, figures.Picture]:
    """The report's figures by name, of whatever has run; `data` as gathered."""
    return {name: picture for name, (_, picture) in _pictures(study, data).items()}


def _each_expert(data: Mapping[str, Any]) -> pd.DataFrame:
    """Accuracy under each expert's prompt, both stages, of the arms that are drawn."""
    rows, lines = [], drawn(data)
    for arm in (arm for arm in data["arms"] if arm["label"] in lines):
        for stage in STAGES.values():
            for measure, score in readable.scores_of(data, arm, stage).items():
                if measure.startswith("expert/"):
                    rows.append({**score, "label": arm["label"], "expert": measure.removeprefix("expert/")})
    return pd.DataFrame(rows)


def drawn(data: Mapping[str, Any]) -> list[str]:
    """Labels of the arms in pictures that cannot hold many: those of table 5 where there are more."""
    arms = [arm for arm in data["arms"] if arm["last_stage"] == "riel"]
    if len(arms) > MOST_DRAWN:
        arms = [arm for arm in arms if "table-5" in arm["tables"]] or arms
    return [arm["label"] for arm in arms[:MOST_DRAWN]]


def _pictures(study: config.Study, data: Mapping[str, Any]) -> Pictures:
    """Of whatever has run."""
    if not data["scores"]:
        return {}
    experts, lines = list(study.base_run().experts.known), drawn(data)
    tested = ", ".join(f"{n:g}" for n in sorted({s["n_questions"] for s in data["scores"] if s["mean"] is not None}))
    chance = "seeds and questions" if len(data["seeds"]) > 1 else "questions"
    how = f"seeds {', '.join(map(str, data['seeds']))}; 95 % intervals ({chance} random)"
    note = f"n = {tested} test questions; {how}"
    others = sum(arm["last_stage"] == "riel" for arm in data["arms"]) - len(lines)
    some = f"; {others} more arms not drawn" if others else ""
    after = [(arm, readable.scores_of(data, arm, STAGES[arm["last_stage"]])) for arm in data["arms"]]
    means = [{"label": a["label"], "kind": a["kind"], **own["mean_expert"]} for a, own in after if own]
    found: Pictures = {}
    if means:
        picture = figures.arms(pd.DataFrame(means), note=f"{note}; small dots: seeds")
        found["arms"] = "Mean expert accuracy after each arm's last stage", picture
    if len(each := _each_expert(data)):
        picture = figures.before_after(each, order=experts, note=f"{note}{some}")
        found["before-after"] = "Before and after stage 2", picture
    samples = [
        {"label": arm["label"], "k": int(key.removeprefix("pass@")), "share": score["mean"], "n": score["n_questions"]}
        | {limit: score[limit] for limit in ("low", "high")}
        for arm, own in after
        for key, score in own.items()
        if arm["label"] in lines and key.startswith("pass@")
    ]
    if samples:
        of, title = f"test, mean of the experts; {how}{some}", "pass@k: one of k samples right"
        picture = figures.shares(pd.DataFrame(samples), "k", title=title, by="label", xlabel="k", order=lines, note=of)
        found["pass-at-k"] = "pass@k", picture
    metrics: dict[str, list[pd.DataFrame]] = {}
    for stage in data["stages"]:
        if stage["stage"] == "stage 2" and stage["state"] == "done" and stage["label"] in lines:
            metrics.setdefault(stage["label"], []).append(RunFolder(study.folder / stage["folder"]).read_metrics())
    if metrics:
        found["rewards"] = f"Training reward and all-wrong groups{some}", figures.rewards(metrics, order=lines)
    answered = max(_answered(study), key=lambda found: len(found[0]), default=None)
    if answered:
        answers = overlap.answered_by_all(answered[2].read_table("teacher_answers"))
        picture = figures.error_overlap(answers, title="Teachers, training questions")
        found["teachers-overlap"] = "Error overlap of the teachers", picture
        picture = figures.coverage(answers, order=experts)
        found["teachers-coverage"] = "What each further teacher adds, training questions", picture
    return found | _of_example(study, data, experts)


def _of_example(study: config.Study, data: Mapping[str, Any], experts: Sequence[str]) -> Pictures:
    """How the fullest finished arm trained, and how its experts' errors hang together."""
    found: Pictures = {}
    if not data["example"]:
        return found
    run, label = study.run(data["example"]["arm"], data["example"]["seed"]), data["example"]["label"]
    for stage, name in STAGES.items():
        folder, key = RunFolder(run.folder(stage)), name.replace(" ", "-")
        title = f"{label if stage == 'riel' else readable.stage1_label(run.experts.panel)}, seed {run.seed}"
        curves = f"curves-{data['example']['arm'] if stage == 'riel' else key}"
        found[curves] = title, figures.curves(folder.read_metrics(), order=experts, title=title)
        if len(run.experts.panel) > 1:
            answers, title = folder.read_table("test_greedy"), f"{label}, {name}, seed {run.seed}, test"
            found[f"overlap-{key}"] = f"Error overlap, {name}", figures.error_overlap(answers, title=title)
            found[f"phi-{key}"] = f"Phi, {name}", figures.phi(answers, title=f"Phi after {name}, seed {run.seed}")
    stage1 = RunFolder(run.folder("mef"))
    if len(run.experts.panel) > 1 and stage1.table("prompt_teacher").is_file():
        table, caption = stage1.read_table("prompt_teacher"), f"Prompts and teachers after stage 1, seed {run.seed}"
        found["prompt-teacher"] = caption, figures.prompt_teacher(table, order=experts)
    return found


# --- writing ----------------------------------------------------------------------------------------------------------


def write(study: config.Study) -> Path:
    """Write the study's report under its folder; the path of report.html.

    report.json; tables/: one CSV and one LaTeX file a table, and tables.tex; figures/: PDF, PNG and CSV; report.md, and
    report.html, which holds its figures and needs neither network nor JavaScript.
    """
    folder = study.folder / "report"
    code = runs.tree()
    data = gather(study, code)
    if changes := runs.keep_changes(code, folder):
        data["commit"]["changes"] = os.path.normpath(Path(folder.name) / changes)
    frames = tables(data)
    for part in ("tables", "figures"):  # what an earlier report left must not stand beside this one's
        shutil.rmtree(folder / part, ignore_errors=True)
    RunFolder(folder).write_json("report", data)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for name, frame in {**frames, "scores": pd.json_normalize(data["scores"])}.items():
        frame.to_csv(folder / "tables" / f"{name}.csv", index=False, float_format="%.6g")
    papers = _paper_tables(frames["paper"])
    latex.write(folder / "tables", _sheets(data, frames, papers), data["title"])
    shown = {}
    for name, (caption, picture) in _pictures(study, data).items():
        file = figures.save(picture, folder / "figures" / re.sub(r"[^\w.+-]", "-", name))
        shown[name] = f"![{re.sub(r'[][]', '', caption)}]({file.relative_to(folder)})"
    done = [stage for stage in data["stages"] if stage["state"] == "done"]
    verdicts = [row["verdict"].split(" (")[0] for row in claims.readable(data["paper"]) if row["sure"] != "—"]
    text = _template("report.md.j2").render(
        data=data,
        tables={name: _markdown_table(frame) for name, frame in frames.items()},
        titles={name: table["title"] for name, table in readable.TABLES.items()},
        papers=[(title, _markdown_table(frame)) for title, frame in papers.values()],
        verdict=claims.values()["verdict"],
        verdicts={verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)},
        pictures=shown,
        missing=[row for row in readable.run_rows(data["stages"]) if row["state"] != "done"],
        trained=sorted({readable.commit(stage, 40) for stage in done}),
        written=readable.commit(data["commit"], 40),
        uncommitted=readable.uncommitted(data),
        values=yaml.safe_dump(data["values"], sort_keys=False, allow_unicode=True, width=120).strip(),
    )
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(_page(data["title"], text, folder), encoding="utf-8")
    return folder / "report.html"


def _paper_tables(paper: pd.DataFrame) -> Papers:
    titles = {name: table["title"] for name, table in claims.values()["tables"].items()}
    return {name: (title, paper[paper["table"] == name].drop(columns="table")) for name, title in titles.items()}


def _sheets(data: Mapping[str, Any], frames: Mapping[str, pd.DataFrame], papers: Papers) -> dict[str, latex.Sheet]:
    """The tables for LaTeX: title and note; the paper's one by one."""
    trained = ", ".join(sorted({readable.commit(stage) for stage in data["stages"] if stage["state"] == "done"}))
    made = f"Made by {data['command']}; trained at commit {trained or 'none'}, written at {readable.commit(data['commit'])}."
    seeds, rule = f"Seeds {', '.join(map(str, data['seeds']))}.", claims.values()["verdict"]["rule"]
    about = {n: f"{t['note']} {seeds if t.get('seeds', True) else ''} {made}" for n, t in readable.TABLES.items()}
    found = {n: latex.Sheet(frames[n], t["title"], about[n]) for n, t in readable.TABLES.items() if n != "paper"}
    beside = f"{rule} {about['paper']}"
    return found | {f"paper-{name}": latex.Sheet(frame, title, beside) for name, (title, frame) in papers.items()}


def _markdown_table(frame: pd.DataFrame) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(re.sub(r"[ \n]+", " ", str(cell)).replace("|", "\\|") for cell in cells) + " |"

    if frame.empty:
        return "Not run."
    rule = line("---" for _ in frame.columns)
    return "\n".join([line(frame.columns), rule, *(line(row) for row in frame.itertuples(index=False))])


def _template(name: str):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Markdown is escaped when it is rendered (html=False), the page's own values by autoescape.
    settings = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=name.endswith(".html.j2"), **settings).get_template(name)


def _page(title: str, text: str, folder: Path) -> str:
    """Markdown as one self-contained page: images inline, a table of contents, raw HTML shown and not run."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens, contents = markdown.parse(text), []
    for place, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            heading = tokens[place + 1].content
            anchor = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")
            token.attrSet("id", anchor)
            contents.append((anchor, heading))
        for child in token.children or ():
            if child.type == "image" and (file := folder / str(child.attrGet("src"))).is_file():
                image = file.read_bytes()
                child.attrSet("src", f"data:image/png;base64,{base64.b64encode(image).decode()}")
                child.attrSet("width", str(int.from_bytes(image[16:20], "big") * 7 // 10))  # one scale for all figures
    body = markdown.renderer.render(tokens, markdown.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return _template("report.html.j2").render(title=title, contents=contents, body=Markup(body))
