"""Reading final answers: what counts as stated, what is unreadable, and that no text is slow to read."""

import json
import os
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import reading_agreement as agreement

from meml_lib.tasks import reading

READERS = (reading.number, reading.letter, reading.yes_no, reading.free_text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 2 + 3 = 5\n#### 18", "18"),
        ("#### 3\nno, wait\n#### 18", "18"),
        ("####18", "18"),
        ("#### $1,250.00", "1250"),
        ("#### 1,234,567", "1234567"),
        ("#### 1\u00a0250", "1250"),
        ("#### -5", "-5"),
        ("#### \u22125", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 50%", "50"),
        ("#### 18 dollars.", "18"),
        ("#### 3.0", "3"),
        ("#### .5", "1/2"),
        ("#### 1/2", "1/2"),
        ("#### 6/3 cups", "2"),
        ("#### 2 1/2", "5/2"),
        ("#### **18**", "18"),
        ("#### x = 18", "18"),
        ("#### 2:00 pm", "2"),
        ("#### \u0661\u0668", "18"),
        ("#### 1\u200b8\u200f", "18"),
        ("#### total.18", "18"),
        ("#### 18\n\nThat is all 20 of it.", "18"),
        ("She pays 3.\nA: 16 - 3 = 13", "13"),
        ("How many? A: 18 of 20", "18"),
        ("A: 18\nThat the answer is 5 was a guess.", "18"),
        ("**Answer:** $18 for 3 days", "18"),
        ("**Final Answer: 18**", "18"),
        ("The answer is:\n$18", "18"),
        ("The answer is 18. That took 2 steps.", "18"),
        ("The answer is **18** (16 + 2).", "18"),
    ],
)
def test_number_reads_the_stated_answer(text, answer):
    assert reading.number(text) == answer


@pytest.mark.parametrize(
    ("inside", "answer"),
    [
        ("18", "18"),
        (r"\text{\$18}", "18"),
        (r"\$1,250.50", "2501/2"),
        (r"18 \text{ eggs in } 3 \text{ days}", "18"),
        (r"\text{18 eggs}", "18"),
        (r"\mathbf{18}", "18"),
        ("{{18}}", "18"),
        (r"\boxed{18}", "18"),
        (r"18\,\mathrm{cm}^2", "18"),
        (r"18^{\circ}", "18"),
        (r"50\%", "50"),
        ("1{,}234", "1234"),
        (r"1\,234", "1234"),
        (r"1,\!234", "1234"),
        ("3.0", "3"),
        ("-2.50", "-5/2"),
        (r"\frac{1}{2}", "1/2"),
        (r"\dfrac{3}{4}", "3/4"),
        (r"\tfrac12", "1/2"),
        (r"-\frac{1}{2}", "-1/2"),
        (r"3\frac{1}{2}", "7/2"),
        ("10/3", "10/3"),
        ("86+42=128", "128"),
        (r"5:00 \text{ PM}", "5"),
        ("18th", "18"),
        ("", None),
        ("N/A", None),
        ("three", None),
        ("3x", None),
        ("2x + 3", None),
        ("1350 + X", None),
        ("2^{10}", None),
        (r"9\sqrt{2}", None),
        (r"\sqrt{3}", None),
        (r"\frac{\sqrt{3}}{2}", None),
        (r"18\pi", None),
        (r"1.2 \times 10^6", None),
        (r"\frac{1}{0}", None),
        ("2\u00bd", None),
    ],
)
def test_number_reads_a_box(inside, answer):
    for text in (rf"\boxed{{{inside}}}", rf"3 * 6 = 18, so \boxed{{5}} or $\boxed {{ {inside} }}$ for 7 days.\n"):
        assert reading.number(text) == answer


def test_the_last_box_counts_and_one_cut_short_is_unreadable():
    assert reading.number(r"\boxed{5}, no: \boxed{7}") == "7"
    assert reading.number(r"\boxed{5}, no: \boxed{1") is None
    assert reading.number(r"\boxed{\text{1") is None
    assert reading.number("#### 3\nno, \\boxed{7}") == "7"
    assert reading.number("so \\boxed{7}\n#### 3") == "3"
    assert reading.number("#### \\boxed{18}") == "18"


def test_a_heading_is_no_mark():
    steps = "#### Step 1: add\n3 + 4 = 7\n\n#### 2. Double it\n2 * 7 = 14\n\n"
    assert reading.number(steps + "She has 14 apples after 3 days.") == "14"
    assert reading.number(steps + "so \\boxed{14}") == "14"
    assert reading.number(steps + "#### Final Answer\n14") == "14"
    assert reading.letter("#### B) the first option\nToo small.\n\nThe answer is C.") == "c"
    assert reading.letter("#### c\nIt fits best.") == "c"
    assert reading.yes_no("#### Yes: the case for it\nIt is weak. So the answer is no.") == "no"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The total is 4 * 5 = 20.", "20"),
        ("8 * 30 = 240 apples.\n\nTherefore, they eat 240 apples in 30 days.", "240"),
        ("He makes $180 * 7 = $<<180*7=1260>>1260. So he makes $1260 in a 7-day week.", "1260"),
        ("3 - 10 = -7\nTherefore, the guess was off by 7 beans of 20.", "7"),
        ("60 - 50 = 10\nTherefore, with $60 he buys 10 more.", "10"),
        ("So he earned $42 in 6 hours.", "42"),
        ("They eat **240 apples** in 30 days.", "240"),
        ("Job A: $15\nSo 20 - 15 = $5 more at job B in a week of 7 days.", "5"),
        ("36 teachers work at Dr. Wertz's school.", "36"),
        ("First 7, then 9.", "9"),
        ("Since you can't have half a bus, they need 8 buses.", "8"),
        ("He arrives at 5 p.m. on Monday.", "5"),
        ("Janet makes **18** dollars.\n\nLet me know if you have other questions!", "18"),
        ("\\[ 3 + 5 = 8 \\]", "8"),
        ("\u7b54\u6848\u662f18\u3002", "18"),
        ("72", "72"),
        ("18 dollars", "18"),
        ("**18**", "18"),
        ("3 + 15 is it\nx = 18", "18"),
        ("- **Total:** $18", "18"),
        ("I cannot determine how many of the 5 are left.", None),
        ("The number of the 12 boxes cannot be determined.", None),
        ("Only 5 is given: there is not enough information.", None),
        ("I'm sorry, but question 5 is none that I answer.", None),
        ("The answer is that we cannot determine it from 3 facts.", None),
        (r"\boxed{\text{cannot be determined from 3 facts}}", None),
        ("A: Not enough information: only 2 facts.", None),
        ("#### 5 (sorry for the steps)", "5"),
        ("-48 / 3 = -16. There must be an error in the question.", None),
        ("Therefore, he must drink 5x - 4 cups less.", None),
        ("She pays 3 * 20 = 6", None),
        ("He has 5 apples. He then buys 3", None),
        ("He has 5 apples, so he", None),
        ("In total 5 +", None),
        ("I paid 1,", None),
    ],
)
def test_without_a_mark_the_last_sentence_is_read_if_it_is_complete_and_concludes(text, answer):
    assert reading.number(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no idea",
        "####",
        "#### none",
        "#### 1/0",
        "#### 9**9**9**9",
        "It is 9**9**9**9.",
        "#### 2^10",
        "#### 16 - 3",
        "#### 16 x 3",
        "#### 3\u20135",
        "#### 1e6",
        "#### 1,2345",
        "#### 1,",
        "It is 1,2345.",
        "It is 3:4.",
        "It is 3 x 4.",
        "#### 10:30",
        "#### 1.2.3",
        "#### 12/05/2020",
        "#### " + "7" * 41,
        "\x00\x00",
    ],
)
def test_number_takes_no_part_of_something_else(text):
    assert reading.number(text) is None


def test_marked_number_needs_its_mark():
    assert reading.number("5 + 3 = 8", marked=True) is None
    assert reading.number("so \\boxed{8}. The answer is 8.", marked=True) is None
    assert reading.number("5 + 3 = 8 #### 8", marked=True) == "8"
    assert reading.number("5 + 3 = 8 #### 8 coins\ntom has 9", marked=True) == "8"
    assert reading.number("5 + 3 = 8 ####", marked=True) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### c", "c"),
        ("#### (C)", "c"),
        (r"\boxed{c}", "c"),
        (r"\boxed{\text{C}}", "c"),
        (r"\boxed{\text{(C)}}", "c"),
        (r"\boxed{\textbf{(C)}}", "c"),
        (r"\boxed{\mathrm{C}}", "c"),
        (r"$\boxed{C. 12}$", "c"),
        (r"\boxed{\text{option C}}", "c"),
        ("answer : c", "c"),
        ("answer - option c .", "c"),
        ("**Answer:** C", "c"),
        ("**Answer: (C) 12**", "c"),
        ("Answer:\nC", "c"),
        ("The answer is c.", "c"),
        ("the answer is (c) 12", "c"),
        (r"the answer is $C$", "c"),
        (r"the answer is \(\text{C}\)", "c"),
        ("The answer is A because it fits.", "a"),
        ("The correct answer is: **B) 12**", "b"),
        ("the correct choice is **C**", "c"),
        ("so the correct option is : d", "d"),
        ("hence answer will be ( d )", "d"),
        ("hence , c is the correct answer .", "c"),
        ("Thus, C is correct.", "c"),
        ("I choose B.", "b"),
        ("option a is the closest", "a"),
        ("Option A is wrong. The answer is C. Option B is, too.", "c"),
        ("answer : a", "a"),
        ("(c)", "c"),
        ("C.", "c"),
        ("c )", "c"),
        ("c", "c"),
        ("**C**", "c"),
        ("C) 12 miles", "c"),
        ("It fits best\nC", "c"),
        ("each angle would be 60 . c", "c"),
        ("** Result:** (C)", "c"),
        ("either (a) or (b)", None),
        ("so 3 + b", None),
        ("I took option b first.\n#### e", "e"),
        ("the answer is a number", None),
        ("Answer: A robe takes two.", None),
        ("answer : 1 / 8 mile", None),
        ("the answer is e ^ 2", None),
        ("the answer is not known", None),
        ("A) 5\nB) 6\nC) 7", None),
        ("I cannot decide.", None),
        ("#### f", None),
        ("so x = 5", None),
        ("because", None),
        ("", None),
    ],
)
def test_letter_reads_the_named_option(text, answer):
    assert reading.letter(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### yes", "yes"),
        ("#### No.", "no"),
        ("He did not. #### yes", "yes"),
        ("the answer is no", "no"),
        ("So the answer is: **Yes**.", "yes"),
        ("**Answer:** No", "no"),
        ("Answer:\nNo", "no"),
        ("The answer is most likely yes.", "yes"),
        ("The answer is a resounding no.", "no"),
        ("The answer is not yes.", "no"),
        ("The answer is **not yes**.", "no"),
        ("The answer is no, because he was not born.", "no"),
        ("Yes, he could.", "yes"),
        ("**No**, he could not.", "no"),
        ("Therefore, yes.", "yes"),
        ("He was not born then, so no.", "no"),
        ("The statement is false.", "no"),
        ("Not true.", "no"),
        ("Yes, at first it seems so. No, it is not.", "no"),
        ("Yes, it seems so. So the answer is no.", "no"),
        ("#### yes\n#### no", "no"),
        ("true", "yes"),
        (r"\boxed{\text{No}}", "no"),
        (r"the answer is $\boxed{\textbf{No}}$", "no"),
        ("No doubt about it", None),
        ("No. 5 is alive", None),
        ("There is no evidence, yes.", None),
        ("It is not true that he ran.", None),
        ("The answer is yes and no", None),
        ("Answer (Yes/No)", None),
        ("I cannot answer yes or no.", None),
        ("maybe", None),
        ("", None),
    ],
)
def test_yes_no_reads_statements_only(text, answer):
    assert reading.yes_no(text) == answer


def test_free_text_ignores_case_spaces_bold_and_the_closing_period():
    assert reading.free_text("The answer is  Mont   Blanc.") == "mont blanc"
    assert reading.free_text("It is in France.\n**Mont Blanc**") == "mont blanc"
    assert reading.free_text(r"\boxed{\text{Mont Blanc}}") == "mont blanc"
    assert reading.free_text("####") is None


@pytest.mark.skipif(not os.environ.get("MEML_DATA_DIR"), reason="set MEML_DATA_DIR to the released data sets")
def test_a_socratic_solution_reads_as_its_gold_also_by_its_last_sentence():
    rows = Path(os.environ["MEML_DATA_DIR"], "gsm8k", "test_socratic.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(row)["answer"] for row in rows]
    assert len(answers) == 1319
    for answer in answers:
        gold = answer.rsplit("####", 1)[1].strip().replace(",", "")
        assert reading.number(answer) == gold
        assert reading.number(rf"{answer.rsplit('####', 1)[0]} \boxed{{{gold}}}") == gold


@pytest.mark.skipif(not os.environ.get("MEML_DATA_DIR"), reason="set MEML_DATA_DIR to the released data sets")
def test_of_real_answers_every_disagreement_is_judged_and_at_most_3_in_1000_are_misread():
    rows, judged = agreement.answers(), pd.read_csv(agreement.FOLDER / "judged.csv", dtype={"ours": "string"})
    found = agreement.disagreements(rows, ("published",))
    assert len(found) == 68 and agreement.unjudged(found, judged).empty
    changed = judged.assign(ours=judged["ours"].replace("57500", "57"))  # a judgment of another reading holds no more
    assert len(agreement.unjudged(found, changed)) == 1 and len(agreement.unjudged(found, judged.iloc[1:])) == 1
    table = agreement.agreement(rows, judged)
    assert table["answers"].sum() == 3438 and table["misread by us"].sum() == 4
    assert table["misread by us"].sum() <= 0.003 * table["readable"].sum()
    committed = pd.read_csv(agreement.FOLDER / "agreement.csv")
    pd.testing.assert_frame_equal(table, committed, check_dtype=False, atol=0.001)


# --- hostile answers --------------------------------------------------------------------------------------------------

MEGABYTE = 1_000_000
REPEATED = {  # what is repeated to a megabyte
    "digits": "1",
    "groups": "1,111",
    "commas": "1,",
    "decimals": "1.",
    "fractions": "1 / ",
    "mixed": "1 1/1 ",
    "digits apart": "1 ",
    "money": "$1 ",
    "clocks": "1:00 ",
    "right-to-left digits": "1\u200f",
    "arabic digits": "\u0661",
    "thin spaces": "1\u2009",
    "powers": "9**",
    "spaced powers": "9 ** ",
    "powers of LaTeX": "9^{",
    "minus": "-1",
    "results": "= 1",
    "equals": "=",
    "sentences": "So 1. ",
    "short sentences": ". A",
    "spaced sentences": ".   ",
    "lines": "\n",
    "returns": "\r\n",
    "words and lines": "1\n",
    "polite": "I hope that helps!\n",
    "refusals": "cannot be ",
    "refused sentences": "I cannot determine 1. ",
    "bold": "**1",
    "bold ends": "** 1** ",
    "stars": "*",
    "marks": "####",
    "spaced marks": "#### ",
    "mark lines": "####\n",
    "headings": "#### Step 1: a b\n",
    "answers": "the answer is ",
    "answer colons": "Answer: ",
    "numbered answers": "Answer: 1",
    "boxes": "\\boxed{",
    "closed boxes": "\\boxed{1}",
    "spaced boxes": "\\boxed ",
    "fractions of LaTeX": "\\frac{",
    "whole fractions of LaTeX": "\\frac{1}{",
    "mixed of LaTeX": "1 \\frac11",
    "braces": "{",
    "brace pairs": "{}",
    "backslashes": "\\",
    "parentheses": "(",
    "texts": "\\text{",
    "commands": "\\a",
    "colons": " \nA:",
    "spaced lines": " \n",
    "dollars": "$",
    "spaces": " ",
    "options": "option a ",
    "answers are": "answer is ",
    "answers to": "answer to this question is most likely an a",
    "letters": "a",
    "lettered": "a ) ",
    "letter sentences": "a is the ",
    "choose": "choose option (",
    "nots": "not ",
    "said": "so, no ",
    "said lines": "no\n",
    "null": "\x00",
    "surrogates": "\ud800",
    "marks of direction": "\u202e",
    "combining": "\u0301",
    "wide": "\U0001f600",
}
TAILS = ("", " 1.", " so no", "}")
HOSTILE = {name: piece * (MEGABYTE // len(piece)) for name, piece in REPEATED.items()} | {
    "marked digits": "#### " + "1" * MEGABYTE,
    "fraction of digits": "#### 1/" + "1" * MEGABYTE,
    "too many digits to convert": "#### " + "7" * 4301,
    "boxed too many digits": "\\boxed{" + "7" * 4301 + "}",
    "number ends": "1" + " " * MEGABYTE + "1",
    "box spaces": "\\boxed" + " " * MEGABYTE,
    "boxed braces": "\\boxed{" + "{" * 40_000 + "1" + "}" * 40_001,
    "boxed parentheses": "\\boxed{" + "(" * 40_000 + "1" + ")" * 40_000 + "}",
    "boxed power": "\\boxed{9**9**9**9}",
    "boxed tower": "\\boxed{9^{9^{9^{9}}}}",
    "boxed factorial": "\\boxed{99999999!}",
    "boxed by zero": "\\boxed{\\frac{1}{0}}",
    "answer spaces": "answer" + " " * MEGABYTE,
    "answer is spaces": "the answer is" + " " * MEGABYTE + "an a",
    "no spaces": "no " * (MEGABYTE // 3) + " " * 1000,
}


@pytest.mark.alone
@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_of_anything_is_read_fast_and_in_little_memory(name):
    text = HOSTILE[name]
    for reader in READERS:
        for tail in TAILS:
            start = time.process_time()
            reader(text + tail)
            assert time.process_time() - start < 0.1, (reader, tail)
        tracemalloc.start()
        reader(text)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 2**20, reader


@pytest.mark.alone
def test_hostile_answers_are_read_fast_in_threads_too():
    def timed(job):
        reader, name = job
        start = time.thread_time()
        return reader(HOSTILE[name]), time.thread_time() - start, reader.__name__, name

    jobs = [(reader, name) for name in HOSTILE for reader in READERS]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(timed, jobs))
    assert [answer for answer, *_ in done] == [reader(HOSTILE[name]) for reader, name in jobs]
    slowest = max(row[1:] for row in done)
    print("slowest of", len(jobs), "readings, seconds:", slowest)  # shown with -s
    assert slowest[0] < 0.1


def test_reading_is_linear(monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 100_000)  # a quadratic pattern would take minutes on some of these
    start = time.process_time()
    for text in HOSTILE.values():
        for reader in READERS:
            reader(text)
    assert time.process_time() - start < 60  # 5 s on a slow core
