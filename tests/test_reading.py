"""Reading final answers: what counts as stated, what is unreadable, and that no text is slow to read."""

import time

import pytest

from meml_lib.tasks import reading


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 2 + 3 = 5\n#### 18", "18"),
        ("#### 3\nno, wait\n#### 18", "18"),
        ("####18", "18"),
        ("#### $1,250.00", "1250"),
        ("#### 1,234,567", "1234567"),
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
        ("#### **18**", "18"),
        ("#### x = 18", "18"),
        ("She pays 3.\nA: 16 - 3 = 13", "13"),
        ("The answer is:\n$18", "18"),
        ("The answer is 18. That took 2 steps.", "18"),
        (r"so \boxed{1{,}234} eggs for 3 days", "1234"),
        (r"\boxed{\text{\$18}}", "18"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        ("The total is 4 * 5 = 20.", "20"),
        ("First 7, then 9", "9"),
        ("total.18", "18"),
    ],
)
def test_number_reads_the_stated_answer(text, answer):
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
        "It is 9**9**9**9",
        "#### 2^10",
        "#### 16 - 3",
        "#### 2 1/2",
        "#### 1,2345",
        "It is 1,2345",
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
    assert reading.number("5 + 3 = 8 #### 8", marked=True) == "8"
    assert reading.number("5 + 3 = 8 ####", marked=True) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### c", "c"),
        ("#### (C)", "c"),
        (r"\boxed{c}", "c"),
        (r"\boxed{\text{(C)}}", "c"),
        ("answer : c", "c"),
        ("answer - option c .", "c"),
        ("The answer is c.", "c"),
        ("the answer is (c) 12", "c"),
        ("so the correct option is : d", "d"),
        ("hence answer will be ( d )", "d"),
        ("hence , c is the correct answer .", "c"),
        ("option a is the closest", "a"),
        ("answer : a", "a"),
        ("(c)", "c"),
        ("c )", "c"),
        ("c", "c"),
        ("I took option b first.\n#### e", "e"),
        ("the answer is a number", None),
        ("answer : 1 / 8 mile", None),
        ("the answer is e ^ 2", None),
        ("#### f", None),
        ("so x = 5", None),
        ("because", None),
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
        ("The answer is not yes.", "no"),
        ("The answer is no, because he was not born.", "no"),
        ("Yes, he could.", "yes"),
        ("Yes, at first it seems so. No, it is not.", "no"),
        ("Yes, it seems so. So the answer is no.", "no"),
        ("#### yes\n#### no", "no"),
        ("true", "yes"),
        (r"\boxed{\text{No}}", "no"),
        ("No doubt about it", None),
        ("No. 5 is alive", None),
        ("There is no evidence, yes.", None),
        ("The answer is yes and no", None),
        ("maybe", None),
    ],
)
def test_yes_no_reads_statements_only(text, answer):
    assert reading.yes_no(text) == answer


def test_free_text_ignores_case_spaces_and_the_closing_period():
    assert reading.free_text("The answer is  Mont   Blanc.") == "mont blanc"
    assert reading.free_text("It is in France.\nMont Blanc") == "mont blanc"
    assert reading.free_text("####") is None


MEGABYTE = 1_000_000
HOSTILE = {
    "digits": "1" * MEGABYTE,
    "marked digits": "#### " + "1" * MEGABYTE,
    "groups": "1,111" * (MEGABYTE // 5),
    "commas": "1," * (MEGABYTE // 2),
    "decimals": "1." * (MEGABYTE // 2),
    "fractions": "1 / " * (MEGABYTE // 4),
    "fraction of digits": "#### 1/" + "1" * MEGABYTE,
    "spaces": "1" + " " * MEGABYTE + "1",
    "lines": "\n" * MEGABYTE,
    "marks": "#" * MEGABYTE,
    "spaced marks": "#### " * (MEGABYTE // 5),
    "boxes": "\\boxed{" * (MEGABYTE // 7),
    "box spaces": "\\boxed" + " " * MEGABYTE,
    "answers": "the answer is " * (MEGABYTE // 14),
    "answer spaces": "answer" + " " * MEGABYTE,
    "options": "option a " * (MEGABYTE // 9),
    "nots": "answer is " + "not " * (MEGABYTE // 4),
    "letters": "a" * MEGABYTE,
    "lettered": "a ) " * (MEGABYTE // 4),
    "power": "9" + "**9" * (MEGABYTE // 3),
    "null": "\x00" * MEGABYTE,
    "no spaces": "no " * (MEGABYTE // 3) + " " * 1000,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("reader", [reading.number, reading.letter, reading.yes_no, reading.free_text])
def test_a_megabyte_of_anything_is_read_fast(reader, name):
    start = time.process_time()
    reader(HOSTILE[name])
    assert time.process_time() - start < 0.1


def test_reading_is_linear(monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 200_000)  # a quadratic pattern would take minutes on some of these
    start = time.process_time()
    for text in HOSTILE.values():
        for reader in (reading.number, reading.letter, reading.yes_no, reading.free_text):
            reader(text)
    assert time.process_time() - start < 15  # 1.5 s on a slow core
