"""How our reader of numbers agrees with others on real models' answers, with every disagreement judged by hand.

    MEML_DATA_DIR=... python tests/reading_agreement.py

reads data/gsm8k_chat/answers.jsonl (3,438 answers of two chat models) and the judgments in reports/reading/judged.csv,
prints the tables and writes them to reports/reading (agreement.csv, unboxed.csv, agreement.md). Exit status 1 where a
disagreement is not judged, or was judged for another reading. Must be judged: an answer that we cannot read; one where
we and the published score differ on whether it is right; one where we and the published reader read different numbers;
and, where math-verify is installed (no dependency of ours), one where it reads another number than we do.
Not collected by pytest; a test reads the committed tables.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

import pandas as pd

from meml_lib.analysis import stats
from meml_lib.tasks import reading

FOLDER = Path(__file__).resolve().parents[1] / "reports" / "reading"
KEY = ["against", "question_row", "model", "prompt"]
VERDICTS = ("we misread", "other misread", "none stated", "ambiguous")
"""`none stated`: a refusal or a formula."""


def answers() -> list[dict]:
    """The rows of answers.jsonl, with `ours`: what we read (None also for the rows without any text)."""
    path = Path(os.environ["MEML_DATA_DIR"], "gsm8k_chat", "answers.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row | {"ours": reading.number(row["text"] or "")} for row in rows]


def exact(value: object) -> Fraction | None:
    """A published or parsed value as a number; None where it is none."""
    try:
        return Fraction(str(value).replace(",", ""))
    except ValueError:
        return None


def by_math_verify(row: dict) -> Fraction | str | None:
    """What math-verify reads: an equation's right side; of 20% the 20 (it takes 1/5 for equal too); text for no number."""
    import sympy
    from math_verify import parse

    parsed = parse(row["text"], parsing_timeout=None)  # 0.9.0's own time-out fails off the main thread
    if not parsed:
        return None
    value = parsed[0].rhs if isinstance(parsed[0], sympy.Eq) else parsed[0]
    if str(value).endswith("*(1/100)"):
        return exact(str(value).removesuffix("*(1/100)"))
    if not (isinstance(value, sympy.Expr) and value.is_number and value.is_finite):
        return str(value)
    return Fraction(str(sympy.nsimplify(value, rational=True)))


def disagreements(rows: list[dict], others: tuple[str, ...]) -> pd.DataFrame:
    """What must be judged: `KEY`, ours, other (None: unreadable), score, gold, and the text's last 80 characters."""
    found = []
    for row in rows:
        ours = None if row["ours"] is None else Fraction(row["ours"])
        for against in others if row["text"] else ():
            other = exact(row["published_answer"]) if against == "published" else by_math_verify(row)
            differ = ours is not None and other is not None and ours != other
            if against == "published":
                differ |= ours is None or (ours == row["gold"]) != bool(row["published_score"])
            if differ:
                end = " ".join(row["text"][-80:].split())
                place = {"against": against, **{name: row[name] for name in KEY[1:]}}
                found.append(place | {"ours": row["ours"], "other": other, "score": row["published_score"], "end": end})
                found[-1]["gold"] = row["gold"]
    return pd.DataFrame(found).astype({"ours": "string", "other": "string"})


def unjudged(found: pd.DataFrame, judged: pd.DataFrame) -> pd.DataFrame:
    """The disagreements that the judgments lack, or hold for another reading of ours."""
    merged = found.merge(judged[[*KEY, "ours", "verdict"]], on=KEY, how="left", suffixes=("", "_judged"))
    same = merged["ours"].fillna("") == merged["ours_judged"].fillna("")
    return merged[~(same & merged["verdict"].isin(VERDICTS))]


def agreement(rows: list[dict], judged: pd.DataFrame) -> pd.DataFrame:
    """One row a model and prompt: counts, shares in percent, and the share misread with its 95 % interval (Wilson)."""
    table = []
    by_us = judged[judged["verdict"] == "we misread"].drop_duplicates(KEY[1:])
    for (model, prompt), part in pd.DataFrame(rows).groupby(["model", "prompt"]):
        texts, right = part[part["text"].notna()], part["ours"] == part["gold"].astype(str)
        here = judged[(judged["model"] == model) & (judged["prompt"] == prompt) & (judged["against"] == "published")]
        misread = int(((by_us["model"] == model) & (by_us["prompt"] == prompt)).sum())
        missed = int(((by_us["model"] == model) & (by_us["prompt"] == prompt) & by_us["ours"].isna()).sum())
        readable = int(texts["ours"].notna().sum()) + missed
        interval = stats.wilson(misread, readable)
        table.append(
            {
                "model": model,
                "prompt": prompt,
                "answers": len(part),
                "without text": len(part) - len(texts),
                "unreadable": int(texts["ours"].isna().sum()),
                "right, ours (%)": 100 * right.mean(),
                "right, published (%)": 100 * part["published_score"].mean(),
                "judged": len(here),
                **{verdict: int((here["verdict"] == verdict).sum()) for verdict in VERDICTS},
                "readable": readable,
                "misread by us": misread,
                "misread by us (%)": 100 * misread / readable,
                "low": 100 * interval.low,
                "high": 100 * interval.high,
            }
        )
    return pd.DataFrame(table)


def readers(rows: list[dict], judged: pd.DataFrame) -> pd.DataFrame:
    """The readers side by side, by model, on the answers with a text. Needs math-verify.

    Misread: judged so; what we misread no other reads right. For both together: ours, else math-verify's reading.
    """
    table = []
    verdicts = judged.set_index(KEY)["verdict"].to_dict()
    for model in sorted({row["model"] for row in rows}):
        part = [row for row in rows if row["model"] == model and row["text"]]
        ours = [row["ours"] and Fraction(row["ours"]) for row in part]
        theirs = [by_math_verify(row) for row in part]
        read = {"ours": ours, "published": [exact(row["published_answer"]) for row in part], "math-verify": theirs}
        read["ours, else math-verify"] = [other if own is None else own for own, other in zip(ours, theirs)]
        keys = [tuple(row[name] for name in KEY[1:]) for row in part]
        for name, values in read.items():
            numbers = [isinstance(value, Fraction) for value in values]
            wrong = [verdicts.get((name, *key)) == "other misread" for key in keys]
            wrong = [is_wrong or verdicts.get(("published", *key)) == "we misread" for is_wrong, key in zip(wrong, keys)]
            none = [verdicts.get(("published", *key)) == "none stated" for key in keys]
            table.append(
                {
                    "model": model,
                    "reader": name,
                    "answers": len(part),
                    "a number read": sum(numbers),
                    "equal to the gold": sum(value == row["gold"] for value, row in zip(values, part)),
                    "misread": sum(wrong),
                    "none stated, a number read": sum(a and b for a, b in zip(none, numbers)),
                }
            )
    return pd.DataFrame(table)


def unboxed(rows: list[dict]) -> pd.DataFrame:
    """The same answers with the box's command and braces taken away: do they still read as the box did?"""
    counts = []
    for row in rows:
        if row["ours"] is not None and "\\boxed{" in row["text"]:
            text = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", row["text"])
            bare = reading.number(text)
            how = "as the box" if bare == row["ours"] else "unreadable" if bare is None else "another number"
            counts.append((row["model"], how))
    return pd.DataFrame(counts, columns=["model", "read"]).value_counts().unstack(fill_value=0).reset_index()


def main() -> int:
    rows = answers()
    judged = pd.read_csv(FOLDER / "judged.csv", dtype={"ours": "string", "other": "string"})
    others = ("published", "math-verify") if importlib.util.find_spec("math_verify") else ("published",)
    missing = unjudged(disagreements(rows, others), judged)
    if len(missing):
        print(f"{len(missing)} disagreements are not judged:\n{missing.to_string()}")
        return 1
    tables = {"agreement": agreement(rows, judged), "unboxed": unboxed(rows)}
    comparable = "math-verify" in others
    tables["readers"] = readers(rows, judged) if comparable else pd.read_csv(FOLDER / "readers.csv")
    text = "# Reading real answers\n\nMade by `python tests/reading_agreement.py`.\n"
    for name, table in tables.items():
        table.to_csv(FOLDER / f"{name}.csv", index=False, float_format="%.3f")
        shown = table.round(2).astype(str)
        lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.values.tolist()]
        text += f"\n## {name}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    counts = judged.groupby(["against", "model", "verdict"]).size().rename("answers").reset_index()
    text += "\n## judged\n\n" + "".join(f"- {' · '.join(map(str, line))}\n" for line in counts.values.tolist())
    (FOLDER / "agreement.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
