"""A study's report: first the numbers (`gather`), then what people read (`write`): Markdown, one HTML file, figures.

Every number comes from the tables and metrics in the run folders, with its interval, the number of questions and the
seeds that it rests on. What has not run is listed as not run. In a notebook `compare` sets one run beside the paper.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from meml_lib import config
from meml_lib.analysis import claims, figures, overlap, stats
from meml_lib.runs import RunFolder

STAGES: dict[config.Stage, str] = {"mef": "stage 1", "riel": "stage 2"}


# --- numbers of one arm -----------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One measure: its values for each seed and question, and how they become a number with an interval."""

    kind: Literal["share", "number", "ratio"]
    """share: 0 to 1. ratio: sum of the values / sum of the whole."""
    values_SQ: np.ndarray
    whole_SQ: np.ndarray | None = None

    def interval(self) -> stats.Interval | None:
        """None for a ratio to nothing, e.g. the overlap of no errors."""
        if self.kind == "ratio":
            return stats.crossed_ratio(self.values_SQ, self.whole_SQ) if self.whole_SQ.sum() > 0 else None
        return stats.crossed_mean(self.values_SQ, share=self.kind == "share")

    def seed_means(self) -> list[float | None]:
        whole_SQ = np.ones_like(self.values_SQ) if self.whole_SQ is None else self.whole_SQ
        sums = zip(self.values_SQ.sum(axis=1), whole_SQ.sum(axis=1), strict=True)
        return [part / whole if whole > 0 else None for part, whole in sums]


@dataclass
class ArmResult:
    """What one arm's finished runs measured, by stage ("stage 1", "stage 2")."""

    arm: str
    label: str
    run: config.Run
    seeds: dict[str, list[int]] = field(default_factory=dict)
    questions: dict[str, pd.Index] = field(default_factory=dict)
    measures: dict[str, dict[str, Measured]] = field(default_factory=dict)

    @property
    def panel(self) -> list[str]:
        return list(self.run.experts.panel)

    def scores(self) -> list[dict[str, Any]]:
        """One record a stage and measure: interval, mean of each seed (None where undefined), a ratio's mean whole."""
        records = []
        for stage, measures in self.measures.items():
            for name, measured in measures.items():
                interval = measured.interval()
                per_seed = dict(zip(self.seeds[stage], measured.seed_means(), strict=True))
                head = {"arm": self.arm, "label": self.label, "stage": stage, "measure": name}
                head["whole"] = None if measured.whole_SQ is None else measured.whole_SQ.sum(axis=1).mean()
                records.append({**head, **(asdict(interval) if interval else {"mean": None}), "per_seed": per_seed})
        return records


def measure_arm(arm: str, label: str, runs: Mapping[int, config.Run]) -> ArmResult:
    """Read an arm's finished stages, seed by seed.

    Raises: ValueError if seeds were tested on different questions.
    """
    result = ArmResult(arm, label, next(iter(runs.values())))
    for stage, name in STAGES.items():
        folders = {seed: RunFolder(run.folder(stage)) for seed, run in runs.items()}
        each = {seed: _measure(f, result.panel) for seed, f in folders.items() if f.status["state"] == "done"}
        if not each:
            continue
        first, *others = each
        questions, measures = each[first]
        for seed in others:
            if not each[seed][0].equals(questions):
                odd = [*each[seed][0].symmetric_difference(questions), "their order"][0]
                raise ValueError(f"{arm}, {name}: seeds {first} and {seed} were tested on different questions ({odd})")
        result.seeds[name], result.questions[name] = list(each), questions
        for key, (kind, *_) in measures.items():
            if all(key in found for _, found in each.values()):
                columns = zip(*(found[key][1:] for _, found in each.values()), strict=True)
                result.measures.setdefault(name, {})[key] = Measured(kind, *(np.stack(rows) for rows in columns))
    return result


def _measure(folder: RunFolder, panel: Sequence[str]) -> tuple[pd.Index, dict[str, tuple]]:
    """Question ids, and measure -> (kind, values_Q[, whole_Q]), from one stage's tables."""
    greedy = folder.read_table("test_greedy")
    right = overlap.right_table(greedy)[list(panel)]
    validation = overlap.right_table(folder.read_table("validation_greedy"))[list(panel)].mean()
    prefer = list(validation.sort_values(ascending=False, kind="stable").index)  # ties: panel order
    unreadable = greedy["correct"].isna().groupby(greedy["question_id"]).mean().reindex(right.index)
    right_QE = right.to_numpy(float)
    mean, best, none = right_QE.mean(axis=1), right[prefer[0]].to_numpy(float), 1 - right_QE.max(axis=1)
    found: dict[str, tuple] = {"mean_expert": ("share", mean), "best_validation": ("share", best)}
    found |= {f"expert/{expert}": ("share", right_QE[:, e]) for e, expert in enumerate(panel)}
    if len(panel) > 1:
        vote = overlap.vote(greedy, prefer)["correct"].fillna(False).to_numpy(float)
        found |= {"vote": ("share", vote), "vote_gain": ("number", vote - best), "any_expert": ("share", 1 - none)}
        found |= {"all_wrong": ("share", none), "overlap_iou": ("ratio", none, 1 - right_QE.min(axis=1))}
        for e, expert in enumerate(panel):
            wrong = 1 - right_QE[:, e]
            found[f"corrected/{expert}"] = ("ratio", wrong * (1 - none), wrong)
        if (right_QE.std(axis=0) > 0).all():
            found["mean_phi"] = ("number", _phi_values(right_QE))
    difficulty = folder.read_table("test_questions").set_index("question_id")["difficulty"].reindex(right.index)
    for level in sorted(difficulty.unique()):
        of_level = (difficulty == level).to_numpy(float)
        found[f"difficulty/{level}"] = ("ratio", mean * of_level, of_level)
    if folder.table("test_sampled").is_file():
        sampled = folder.read_table("test_sampled")
        for k in (2**n for n in range(sampled["sample"].nunique().bit_length())):
            found[f"pass@{k}"] = ("share", overlap.hits(sampled, k).mean(axis=1).reindex(right.index).to_numpy())
    found["unreadable"] = ("share", unreadable.to_numpy(float))
    return right.index, found


def _phi_values(right_QE: np.ndarray) -> np.ndarray:
    """Values whose mean is phi, averaged over pairs of experts, and whose spread is each question's influence on it."""
    z = (right_QE - right_QE.mean(axis=0)) / right_QE.std(axis=0)
    pairs = [(z[:, a], z[:, b]) for a in range(z.shape[1]) for b in range(a)]
    return np.mean([x * y + (x * y).mean() * (1 - (x**2 + y**2) / 2) for x, y in pairs], axis=0)


def paired(one: ArmResult, other: ArmResult, measure: str, stage: str = "stage 2") -> stats.Interval | None:
    """one - other on the same questions and seeds; None where they share no seed or lack the measure.

    Raises: ValueError if they were tested on different questions.
    """
    seeds = [seed for seed in one.seeds.get(stage, ()) if seed in other.seeds.get(stage, ())]
    if not seeds or any(measure not in arm.measures[stage] for arm in (one, other)):
        return None
    if not one.questions[stage].equals(other.questions[stage]):
        raise ValueError(f"{one.arm} and {other.arm} were tested on different questions: their answers make no pairs")
    a, b = (arm.measures[stage][measure].values_SQ[[arm.seeds[stage].index(s) for s in seeds]] for arm in (one, other))
    return stats.crossed_mean(a - b)


def compare(p: config.Run, paper: str = "table-4", teachers: pd.DataFrame | None = None) -> pd.DataFrame:
    """paper | ours, interval, n, seeds | difference: the rows of a table of the paper that this run belongs to.

    Args: teachers: their answers; None: those that stage 1 was trained on, if it has run.
    Raises: ValueError for a table that paper.yaml does not have.
    """
    arm = measure_arm(p.run_dir.name, "this run", {p.seed: p})
    folder = RunFolder(p.folder("mef"))
    if teachers is None and folder.table("teacher_answers").is_file():
        teachers = folder.read_table("teacher_answers")
    rows = claims.rows(paper, [arm], [] if teachers is None else [_teachers(arm.panel, teachers)])
    return pd.DataFrame(claims.readable(row for row in rows if row["arm"]))


def run_tables(p: config.Run) -> dict[str, pd.DataFrame]:
    """One run's measures after each stage that is done, and how its stage 2 trained: as `tables` of a study."""
    arm = measure_arm(p.run_dir.name, "this run", {p.seed: p})
    rest = dict.fromkeys(("pairs", "teachers", "paper", "stages"), ())
    found = tables(_plain({"arms": [{"label": arm.label}], "seeds": [p.seed], "scores": arm.scores(), **rest}))
    went = _plain(_training(RunFolder(p.folder("riel")).read_metrics()))
    training = pd.DataFrame([_training_row({"label": arm.label, "seed": p.seed, "training": went})])
    return found | {"training": training}


def run_picture(p: config.Run) -> figures.Picture:
    """Accuracy of each expert of one run, before and after stage 2."""
    scores = pd.DataFrame(measure_arm(p.run_dir.name, "this run", {p.seed: p}).scores())
    note = f"n = {scores['n_questions'].max():g} test questions, one seed; 95 % intervals (questions random)"
    return figures.before_after(_each_expert(scores), order=p.experts.panel, note=note)


# --- the numbers of a study -------------------------------------------------------------------------------------------


def gather(study: config.Study) -> dict[str, Any]:
    """All numbers of a study's report, as plain JSON values: report.json."""
    results = [measure_arm(n, arm.label, {s: study.run(n, s) for s in study.seeds}) for n, arm in study.arms.items()]
    by_name = {result.arm: result for result in results}
    groups = [_panel_and_folder(study, group) for group in study.stage1_groups()]
    answered = [(panel, folder) for panel, folder in groups if folder.table("teacher_answers").is_file()]
    teachers = [_teachers(panel, folder.read_table("teacher_answers")) for panel, folder in answered]
    pairs = []
    for _, one, other, _ in study.comparisons:
        for measure in ("mean_expert", "best_validation"):
            difference = paired(by_name[one], by_name[other], measure)
            numbers = asdict(difference) if difference else {"mean": None}
            pairs.append({"arm": by_name[one].label, "against": by_name[other].label, "measure": measure, **numbers})
    data = {
        "title": study.title,
        "notes": study.notes,
        "params_file": study.params_file,
        "run_file": study.run_params_file,
        "command": command(study),
        "seeds": study.seeds,
        "arms": [
            {"arm": name, "label": arm.label, "experts": by_name[name].panel, "differs": arm.overrides}
            for name, arm in study.arms.items()
        ],
        "scores": [record for result in results for record in result.scores()],
        "pairs": pairs,
        "teachers": teachers,
        "example": _example(results, study),
        "paper": [row for table in claims.values()["tables"] for row in claims.rows(table, results, teachers)],
        "stages": [_stage(study, *key) for key in _stages(study)],
    }
    return _plain(data)


def command(study: config.Study) -> str:
    """The command line that makes this study."""
    given = study.overrides_of(None, study.seeds[0])
    extra = {k: v for k, v in given.items() if k != "seed" and (k not in study.overrides or study.overrides[k] != v)}
    words = [f"--set '{key}={json.dumps(value)}'" for key, value in {"seeds": list(study.seeds), **extra}.items()]
    return " ".join(["meml run", study.params_file, *words])


def _stages(study: config.Study) -> Iterable[tuple[str, str, int, config.Stage]]:
    """(name, arm that speaks for it, seed, stage): stage 1 once for the arms that share it."""
    for group, members in study.stage1_groups().items():
        yield from ((group, members[0], seed, "mef") for seed in study.seeds)
    for arm in study.arms:
        yield from ((arm, arm, seed, "riel") for seed in study.seeds)


def _stage(study: config.Study, name: str, arm: str, seed: int, stage: config.Stage) -> dict[str, Any]:
    """One stage: its state ("not run" without a folder), what it was made with, and how stage 2's training went."""
    folder = RunFolder(study.run(arm, seed).folder(stage))
    state, message = folder.status["state"], folder.status["message"]
    done, path = state == "done", folder.path.relative_to(study.folder)
    manifest = folder.read_json("manifest") if done else {}
    made = {key: manifest.get(key) for key in ("commit", "dirty", "python", "packages", "hardware", "wall_s")}
    label = study.arms[arm].label if stage == "riel" else f"Stage 1: {', '.join(study.run(arm, seed).experts.panel)}"
    head = {"name": name, "label": label, "seed": seed, "stage": STAGES[stage], "folder": str(path)}
    facts = {"state": "not run" if state == "absent" else state, "message": message}
    return {**head, **facts, **made, "training": _training(folder.read_metrics()) if done and stage == "riel" else None}


def _training(metrics: pd.DataFrame) -> dict[str, Any]:
    """Shares in the first and last tenth of the steps, steps in which each loss had rows to train on, flushes."""
    tenth = max(1, len(metrics) // 10)
    ends = {"start": metrics.head(tenth), "end": metrics.tail(tenth)}
    shares = ("reward", "groups_all_wrong", "groups_all_right", "questions_all_wrong", "truncated", "unreadable")
    rows = [column for column in metrics if column.startswith("rows/")]
    return {
        "steps": len(metrics),
        **{f"{name}_{end}": part[name].mean() for name in shares for end, part in ends.items()},
        "steps_with_gradient": {column.removeprefix("rows/"): (metrics[column] > 0).sum() for column in rows},
        "buffer_flushes": metrics["buffer_flushes"].max(),
    }


def _panel_and_folder(study: config.Study, group: str) -> tuple[list[str], RunFolder]:
    """The panel of a stage-1 group, and the folder of its first seed that has the teachers' answers, if any has."""
    runs = [study.run(study.stage1_groups()[group][0], seed) for seed in study.seeds]
    folders = [RunFolder(run.folder("mef")) for run in runs]
    return list(runs[0].experts.panel), next((f for f in folders if f.table("teacher_answers").is_file()), folders[0])


def _teachers(panel: Sequence[str], answers: pd.DataFrame) -> dict[str, Any]:
    """How far the teachers' errors overlap, on the questions that all of them answered."""
    common = overlap.answered_by_all(answers)
    left_out = answers["question_id"].nunique() - common["question_id"].nunique()
    tables = {"accuracy": overlap.accuracy(common), "corrected": overlap.corrected_by_others(common)}
    rows = {name: frame.to_dict("records") for name, frame in tables.items()}
    return {"experts": list(panel), "left_out": left_out, **overlap.overlap_all(common)._asdict(), **rows}


def _example(results: Sequence[ArmResult], study: config.Study) -> dict[str, Any] | None:
    """Every expert's answers to the first test question on which stage 1's experts disagree.

    From the finished arm with most experts and most losses, which also stands for all where one arm's overlap is drawn.
    """
    finished = [result for result in results if set(STAGES.values()) <= result.seeds.keys()]
    if not finished:
        return None
    shown = max(finished, key=lambda r: (len(r.panel), sum(loss is not None for _, loss in r.run.riel.objective)))
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
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if value is pd.NA or isinstance(value, float) and math.isnan(value) else value


# --- tables for people ------------------------------------------------------------------------------------------------

_ARMS = {"best_validation": "best on validation", "vote": "majority vote", "any_expert": "any expert"}
_OVERLAP = {"all_wrong": "wrong for all, %", "overlap_iou": "intersection / union, %", "mean_phi": "mean phi"}


def tables(data: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The report's tables as they are read, in percent with 95 % intervals: name -> frame of texts."""
    arms = {arm["label"]: {"arm": arm["label"], "n": "not run"} for arm in data["arms"]}
    experts, overlaps, difficulty = {}, {}, {}
    for score in data["scores"]:
        label, stage, measure = score["label"], score["stage"], score["measure"]
        head, _, part = measure.partition("/")
        cell = stats.text(score) if measure != "mean_phi" else stats.text(score, scale=1, digits=2)
        if len(score["per_seed"]) < len(data["seeds"]):
            cell += f" ({len(score['per_seed'])}\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}{len(data['seeds'])} seeds)"
        if head == "mean_expert":
            arms[label] |= {"n": score["n_questions"], f"mean expert, {stage}": cell}
        elif stage == "stage 2" and (head in (*_ARMS, "unreadable") or head.startswith("pass@")):
            arms[label] |= {_ARMS.get(head, head): cell}
        elif head == "expert":
            experts.setdefault(measure + label, {"arm": label, "expert": part, "n": score["n_questions"]})[stage] = cell
        elif head == "difficulty":
            difficulty.setdefault(measure + label, {"arm": label, head: part, "n": score["whole"]})[stage] = cell
        if head in _OVERLAP or head == "corrected":
            name = _OVERLAP.get(head) or f"errors of {part} that another answers rightly, %"
            overlaps.setdefault((label, stage), {"arm": label, "stage": stage})[name] = cell
    rows = {
        "arms": arms.values(),
        "differences": map(_pair_row, data["pairs"]),
        "experts": experts.values(),
        "training": [_training_row(stage) for stage in data["stages"] if stage["stage"] == "stage 2"],
        "teachers": [row for group in data["teachers"] for row in _teacher_rows(group)],
        "overlap": overlaps.values(),
        "difficulty": difficulty.values(),
        "paper": claims.readable(data["paper"]),
        "runs": map(_stage_row, data["stages"]),
    }
    frames = {name: pd.DataFrame(list(found), dtype=object) for name, found in rows.items()}
    return {name: frame.where(frame.notna(), "—") for name, frame in frames.items()}


def _pair_row(pair: Mapping[str, Any]) -> dict[str, Any]:
    measure = {"mean_expert": "mean expert", "best_validation": "best on validation"}[pair["measure"]]
    head = {"arm": pair["arm"], "against": pair["against"], "accuracy of": measure}
    if pair["mean"] is None:
        return {**head, "difference (points)": "not run"}
    reading = "higher" if pair["low"] > 0 else "lower" if pair["high"] < 0 else "no difference seen"
    counts = {"n": pair["n_questions"], "seeds": pair["n_seeds"]}
    seen = {"smallest detectable": f"{100 * pair['detectable']:.1f}", "reading": reading}
    return {**head, "difference (points)": stats.text(pair), **counts, **seen}


def _training_row(stage: Mapping[str, Any]) -> dict[str, Any]:
    head, went = {"arm": stage["label"], "seed": stage["seed"]}, stage["training"]
    if went is None:
        return {**head, "steps": stage["state"]}
    shares = {"reward": "reward", "groups_all_wrong": "groups all wrong", "groups_all_right": "groups all right"}
    shares |= {"questions_all_wrong": "questions all wrong", "unreadable": "unreadable", "truncated": "truncated"}
    ends = {f"{n}, %": f"{100 * went[f'{k}_start']:.0f} → {100 * went[f'{k}_end']:.0f}" for k, n in shares.items()}
    gradients = ", ".join(f"{loss} {steps}" for loss, steps in went["steps_with_gradient"].items())
    rest = {"steps with a gradient": gradients, "buffer flushes": went["buffer_flushes"]}
    return {**head, "steps": went["steps"], **ends, **rest}


def _teacher_rows(group: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for row, corrected in zip(group["accuracy"], group["corrected"], strict=True):
        head = {"panel": ", ".join(group["experts"]), "teacher": row["expert"], "n": row["n"]}
        right, rightly = (stats.text({**part, "mean": part["share"]}) for part in (row, corrected))
        errors = {"unreadable": row["unreadable"], "errors": corrected["errors"]}
        yield {**head, "right, %": right, **errors, "errors answered rightly by another, %": rightly}


def _stage_row(stage: Mapping[str, Any]) -> dict[str, Any]:
    commit = (stage["commit"] or "unknown")[:10] + (" + changes" if stage["dirty"] else "")
    state = stage["state"] + (f": {stage['message']}" if stage["state"] == "failed" else "")
    done = {"wall time, s": round(stage["wall_s"] or 0), "commit": commit} if stage["state"] == "done" else {}
    head = {"run": stage["name"], "seed": stage["seed"], "stage": stage["stage"], "state": state}
    return {**head, **done, "folder": stage["folder"]}


# --- writing ----------------------------------------------------------------------------------------------------------


def write(study: config.Study) -> Path:
    """Write the study's report under its folder; the path of report.html.

    report.json, one CSV a table (tables/), PDF + PNG + CSV a figure (figures/), report.md, and report.html, which holds
    its figures and needs neither network nor JavaScript.
    """
    folder = study.folder / "report"
    data = gather(study)
    frames = tables(data)
    RunFolder(folder).write_json("report", data)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for name, frame in {**frames, "scores": pd.json_normalize(data["scores"])}.items():
        frame.to_csv(folder / "tables" / f"{name}.csv", index=False)
    pictures = {}
    for name, (caption, picture) in _pictures(study, data).items():
        file = figures.save(picture, folder / "figures" / re.sub(r"[^\w.+-]", "-", name))
        pictures[name] = f"![{re.sub(r'[][]', '', caption)}]({file.relative_to(folder)})"
    done = [stage for stage in data["stages"] if stage["state"] == "done"]
    text = _template("report.md.j2").render(
        data=data,
        tables={name: _markdown_table(frame) for name, frame in frames.items()},
        pictures=pictures,
        missing=[stage for stage in data["stages"] if stage["state"] != "done"],
        commits=sorted({(s["commit"] or "unknown") + (" + uncommitted changes" if s["dirty"] else "") for s in done}),
        made_with=done[0] if done else None,
    )
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(_page(data["title"], text, folder), encoding="utf-8")
    return folder / "report.html"


def _each_expert(scores: pd.DataFrame) -> pd.DataFrame:
    own = scores["measure"].str.startswith("expert/")
    return scores.assign(expert=scores["measure"].str.partition("/")[2])[own]


def pictures(study: config.Study, data: Mapping[str, Any]) -> dict[str, figures.Picture]:
    """The report's figures by name, of whatever has run; `data` as gathered."""
    return {name: picture for name, (_, picture) in _pictures(study, data).items()}


def _pictures(study: config.Study, data: Mapping[str, Any]) -> dict[str, tuple[str, figures.Picture]]:
    """Name -> (caption, picture), of whatever has run."""
    if not data["scores"]:
        return {}
    scores = pd.DataFrame(data["scores"])
    labels = [arm["label"] for arm in data["arms"]]
    experts = list(dict.fromkeys(expert for arm in data["arms"] for expert in arm["experts"]))
    tested = ", ".join(f"{count:g}" for count in sorted(scores["n_questions"].dropna().unique()))
    chance = "seeds and questions" if len(data["seeds"]) > 1 else "questions"
    note = f"n = {tested} test questions; seeds {', '.join(map(str, data['seeds']))}; 95 % intervals ({chance} random)"
    found: dict[str, tuple[str, figures.Picture]] = {}
    after = scores[scores["stage"] == "stage 2"]
    if len(after):
        means = after[after["measure"] == "mean_expert"]
        found["arms"] = "Mean expert accuracy", figures.arms(means, order=labels, note=f"{note}; small dots: seeds")
    picture = figures.before_after(_each_expert(scores), order=experts, note=note)
    found["before-after"] = "Before and after stage 2", picture
    samples = after[after["measure"].str.startswith("pass@")]
    if len(samples):
        samples = samples.assign(k=samples["measure"].str.removeprefix("pass@").astype(int))
        found["pass-at-k"] = "pass@k", figures.pass_at_k(samples, order=labels, note=f"{note}; mean of the experts")
    metrics: dict[str, list[pd.DataFrame]] = {}
    for stage in data["stages"]:
        if stage["state"] == "done":
            frame = RunFolder(study.folder / stage["folder"]).read_metrics()
            title = f"{stage['label']}, seed {stage['seed']}"
            if stage["stage"] == "stage 2":
                metrics.setdefault(stage["label"], []).append(frame)
            if f"curves-{stage['name']}" not in found:  # one seed each; the others are in the run folders
                found[f"curves-{stage['name']}"] = title, figures.curves(frame, order=experts, title=title)
    if metrics:
        found["rewards"] = "Training reward, all-wrong groups", figures.rewards(metrics, order=labels)
    widest = max(study.stage1_groups(), key=lambda group: len(_panel_and_folder(study, group)[0]))
    panel, folder = _panel_and_folder(study, widest)
    if len(panel) > 1 and folder.table("teacher_answers").is_file():
        answers = overlap.answered_by_all(folder.read_table("teacher_answers"))
        picture = figures.error_overlap(answers, title="Teachers, training questions")
        found["teachers-overlap"] = "Error overlap of the teachers", picture
    if data["example"] and len(data["example"]["answers"]) > len(STAGES):
        run = study.run(data["example"]["arm"], data["example"]["seed"])
        for stage, name in STAGES.items():
            answers, key = RunFolder(run.folder(stage)).read_table("test_greedy"), name.replace(" ", "-")
            title = f"{data['example']['label']}, {name}, seed {run.seed}, test"
            found[f"overlap-{key}"] = f"Error overlap, {name}", figures.error_overlap(answers, title=title)
            found[f"phi-{key}"] = f"Phi, {name}", figures.phi(answers, title=f"Phi after {name}, seed {run.seed}")
    return found


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
