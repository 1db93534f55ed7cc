"""Tasks: splits that share nothing, solutions that are right, gold answers that are accepted, rows that are counted."""

import contextlib
import hashlib
import io
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from meml_lib import schema, tasks
from meml_lib.tasks import gsm8k, jsonl, wordproblems
from meml_lib.tasks.mathqa import read_options
from meml_lib.tasks.released import hold_out

needs_data = pytest.mark.skipif(
    not os.environ.get("MEML_DATA_DIR"), reason="set MEML_DATA_DIR to the released data sets"
)
SPLITS = ("train", "validation", "test")
PARAMS = Path(__file__).parents[1] / "params" / "tasks"


def test_the_values_may_name_the_styles_and_mistakes_that_stories_have():
    assert schema.STYLES["wordproblems"] == tuple(wordproblems.STYLES)
    assert schema.MISTAKES["wordproblems"] == wordproblems.KINDS


def world(**changes):
    values = yaml.safe_load((PARAMS / "wordproblems.yaml").read_text())["task"]
    sizes = {"train_questions": 1500, "validation_questions": 100, "test_questions": 200}
    return wordproblems.WordProblems(schema.WordProblemsParams(**(values | sizes | changes)))


def derived(style, **mistake):
    return schema.DerivedTeacher(kind="derived", style=style, **mistake)


def everything(task):
    return [question for split in SPLITS for question in task.questions(split)]


# --- word problems ----------------------------------------------------------------------------------------------------

SENTENCES = (  # an evaluator of its own, which reads the text and knows nothing of the generator's events
    (r"(?:at first )?\w+ (?:has|starts with) (\d+) \w+", lambda a: a),
    (r"\w+ finds (\d+) more", lambda x, a: x + a),
    (r"\w+ gives \w+ (\d+) more", lambda x, a: x + a),
    (r"\w+ picks up (\d+) new ones", lambda x, a: x + a),
    (r"\w+ loses (\d+)", lambda x, a: x - a),
    (r"\w+ gives (\d+) to \w+", lambda x, a: x - a),
    (r"(\d+) of them break", lambda x, a: x - a),
    (r"\w+ (?:buys|brings|gets) (\d+) (?:bags|boxes|packs) (?:with|of) (\d+)(?: each)?", lambda x, a, b: x + a * b),
    (r"\w+ doubles that amount|soon there are twice as many|the pile grows to double size", lambda x: 2 * x),
    (r"\w+ splits them evenly among (\d+) and keeps one share", lambda x, a: x / a),
    (r"(\d+) people share equally and \w+ keeps one part", lambda x, a: x / a),
)


def amounts(text):
    """The amount at the start and after each event."""
    found = []
    for sentence in text.split(" . ")[:-1]:  # all but the question
        ((step, numbers),) = [(step, m.groups()) for rule, step in SENTENCES if (m := re.fullmatch(rule, sentence))]
        found.append(step(*found[-1:], *map(int, numbers)))
        assert 0 <= found[-1] <= 60 and found[-1] == int(found[-1])
    return [int(x) for x in found]


def test_every_style_is_right_on_every_story():
    task = world()
    for question in everything(task):
        assert question.gold == str(amounts(question.text)[-1])
        for style in task.styles:
            assert task.grade(task.teach(question, derived(style)), question).correct is True
        assert task.grade(question.rationale, question).correct is True


def test_every_step_of_every_solution_holds():
    task = world()
    for question in everything(task):
        steps, story, total = (task.teach(question, derived(style)).split(" #### ")[0] for style in task.styles)
        assert [int(x) for x in re.findall(r"(?:starts with|has) (\d+)", story)] == amounts(question.text)
        equations = steps.split(" ; ") + total.split(" . ")[:-1]
        running = total.split("total ")[1].split()  # 10 - 3 = 7 + 8 = 15: each result is the next equation's start
        equations += [" ".join(running[i : i + 5]) for i in range(0, len(running) - 1, 4)]
        for equation in equations:
            left, right = equation.split(" = ")
            assert eval(left) == int(right), (equation, question.text)


@pytest.mark.parametrize("style", wordproblems.STYLES)
@pytest.mark.parametrize("kind", wordproblems.KINDS)
def test_a_mistaken_teacher_errs_on_its_kind_and_only_there(style, kind):
    task = world()
    teacher = derived(style, mistaken_on=kind)
    met = wrong = 0
    for question in task.questions("train"):
        correct = task.grade(task.teach(question, teacher), question).correct
        if any(event.kind == kind for event in question.events):
            met, wrong = met + 1, wrong + (correct is False)
        else:
            assert correct is True
    assert wrong >= 0.95 * met > 400  # a few mistakes cannot show, e.g. 2 doubled is 2 + 2


def test_mistakes_are_the_documented_ones():
    task = world()
    event = wordproblems.Event
    events = (event("loss", n=3), event("groups", n=4, k=2), event("doubling"), event("sharing", k=5))
    story = wordproblems.Story("q", "", "6", "", 4, "tom", 10, events)
    assert task.teach(story, derived("equations", mistaken_on="loss")) == (
        "10 + 3 = 13 ; 2 * 4 = 8 ; 13 + 8 = 21 ; 21 * 2 = 42 ; 42 / 5 = 8 #### 8"
    )
    assert task.teach(story, derived("story", mistaken_on="doubling")) == (
        "tom starts with 10 . tom loses 3 and has 7 . 2 bags of 4 make 8 and tom has 15 . tom gets 2 and has 17 . "
        "tom shares by 5 and has 3 . #### 3"
    )
    assert task.teach(story, derived("groups", mistaken_on="sharing")) == (
        "2 * 4 = 8 . total 10 - 3 = 7 + 8 = 15 * 2 = 30 - 5 = 25 #### 25"
    )


def test_mistaken_share_draws_by_question_and_style():
    task = world()
    having = [q for q in task.questions("train") if any(event.kind == "loss" for event in q.events)]
    erring = {}
    for style in ("equations", "story"):
        teacher = derived(style, mistaken_on="loss", mistaken_share=0.5)
        erring[style] = {q.id for q in having if not task.grade(task.teach(q, teacher), q).correct}
    for ids in erring.values():
        assert 0.4 < len(ids) / len(having) < 0.6
    both = len(erring["equations"] & erring["story"])
    assert 0.15 < both / len(having) < 0.35  # independent draws, not the same ones


def test_no_story_stands_in_two_splits():
    questions = everything(world())
    assert len({question.text for question in questions}) == len({question.id for question in questions}) == 1800
    crowded = everything(world(max_operations=1, largest_number=20, train_questions=5000))
    assert len({question.text for question in crowded}) == 5300  # repetitions were drawn, and left out


def test_stories_depend_on_their_seed_alone():
    first = world().questions("test")
    assert first == world(train_questions=10).questions("test") != world(world_seed=8).questions("test")
    assert first[:50] == world(test_questions=50).questions("test")


def test_the_world_is_the_same_everywhere():
    """Pinned: the studies' numbers are of this world, and no Python, platform or edit may quietly make another."""
    task = world(world_seed=7, min_operations=1, max_operations=4, largest_number=60)
    told = "\n".join(f"{question.id} {question.text} {question.rationale}" for question in everything(task))
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "876fe871a9113640"


def test_lengths_and_kinds_are_about_uniform():
    task = world()
    lengths = Counter(question.difficulty for question in task.questions("train"))
    kinds = Counter(event.kind for question in task.questions("train") for event in question.events)
    assert sorted(lengths) == [1, 2, 3, 4] and len(kinds) == 5
    for counts in (lengths, kinds):
        assert max(counts.values()) < 1.25 * min(counts.values())


@pytest.mark.parametrize("largest", [20, 60])
def test_words_cover_all_texts(largest):
    task = world(largest_number=largest, train_questions=500)
    words = task.words()
    assert len(words) == len(set(words)) == 84 + largest + 1
    for question in everything(task):
        texts = [question.text]
        for style in task.styles:
            texts += [task.teach(question, derived(style, mistaken_on=kind)) for kind in (None, *wordproblems.KINDS)]
        for text in texts:
            assert set(text.split()) <= set(words)
            assert " ".join(text.split()) == text == text.lower()


def test_unknown_styles_kinds_and_splits_are_errors():
    task = world(train_questions=10)
    question = task.questions("train")[0]
    with pytest.raises(ValueError, match="style='poem'.*equations"):
        task.teach(question, derived("poem"))
    with pytest.raises(ValueError, match="mistaken_on='thrift'.*loss"):
        task.teach(question, derived("story", mistaken_on="thrift"))
    with pytest.raises(ValueError, match="split='dev'"):
        task.questions("dev")


# --- released data sets -----------------------------------------------------------------------------------------------


def released(name, **changes):
    values = yaml.safe_load((PARAMS / f"{name}.yaml").read_text())["task"]
    return tasks.load(schema.ReleasedParams(**(values | {"source": "files"} | changes)))


@needs_data
def test_gsm8k_accepts_every_gold_answer_and_rejects_near_misses():
    task = released("gsm8k")
    assert [len(task.questions(split)) for split in SPLITS] == [6973, 500, 1319]
    raw = {
        f"gsm8k-{part}-{i}": json.loads(line)["answer"]
        for part in ("train", "test")
        for i, line in enumerate(Path(os.environ["MEML_DATA_DIR"], "gsm8k", f"{part}.jsonl").open(encoding="utf-8"))
    }
    assert len(raw) == 8792
    for question in everything(task):
        written = raw[question.id].rsplit("####", 1)[1].strip()
        for text in (raw[question.id], question.rationale, f"#### {written}", f"So the answer is ${written}.", written):
            assert task.grade(text, question).correct is True, text
        gold = int(question.gold)
        for near in (gold + 1, gold * 10 or 1, -gold or 1, f"{gold}1", f"1{abs(gold)}", f"{gold}.5"):
            assert task.grade(f"#### {near}", question).correct is False, near


@needs_data
def test_gsm8k_leaves_out_solutions_without_marks_for_two_styles():
    task = released("gsm8k")
    for style in task.styles:
        answers = [(task.teach(question, derived(style)), question) for question in everything(task)]
        assert sum(text is None for text, _ in answers) == (0 if style == "gold" else 113)
        assert all(task.grade(text, question).correct for text, question in answers if text is not None)
        assert not any("<<" in text for text, _ in answers if text)


@needs_data
def test_gsm8k_programs_print_the_gold_answer():
    task = released("gsm8k")
    numbers = 0
    for question in task.questions("test"):
        if program := task.teach(question, derived("program")):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(program, {})  # the final "#### N" is a comment
            assert float(printed.getvalue()) == pytest.approx(float(question.gold))
            numbers += bool(re.search(r"print\([-\d]", program))
    assert 0 < numbers < 0.1 * 1319  # solutions whose last calculation carries no mark


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "mathqa", "strategyqa"])
def test_released_splits_share_no_question_and_a_cap_only_drops(name):
    task, capped = released(name), released(name, train_questions=100)
    texts = [{question.text for question in task.questions(split)} for split in SPLITS]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert len({question.id for question in everything(task)}) == len(everything(task))
    assert len(capped.questions("train")) == 100 and set(capped.questions("train")) < set(task.questions("train"))
    assert capped.questions("validation") == task.questions("validation")
    other = released(name, split_seed=1)
    assert other.questions("validation") != task.questions("validation")


@needs_data
def test_the_re_split_holds_gsm8ks_test_questions_alone_and_divides_them_by_question():
    values = yaml.safe_load((PARAMS / "gsm8k-test-resplit.yaml").read_text())["task"]
    params = {"validation_questions": 100, "test_questions": 319}
    task = tasks.load(schema.Gsm8kResplitParams(**values | params))
    assert task.name == "gsm8k-test-resplit" and [len(task.questions(split)) for split in SPLITS] == [900, 100, 319]
    by_id = {question.id: question for question in released("gsm8k").questions("test")}
    assert {question.id: question for question in everything(task)} == by_id
    equations = [task.teach(question, derived("equations")) for question in task.questions("train")]
    assert sum(text is not None for text in equations) > 850
    capped = tasks.load(schema.Gsm8kResplitParams(**values | params | {"train_questions": 50}))
    assert len(capped.questions("train")) == 50 and capped.questions("test") == task.questions("test")
    other = tasks.load(schema.Gsm8kResplitParams(**values | params | {"split_seed": 1}))
    assert other.questions("test") != task.questions("test")


@needs_data
def test_mathqa_counts_every_row_and_accepts_every_gold_answer():
    task = released("mathqa")
    assert len(everything(task)) + sum(task.malformed.values()) == 4475 + 2985
    assert task.malformed == {"the right option stands twice": 25}
    as_written = Counter()
    for question in everything(task):
        for text in (question.gold, question.rationale, f"answer : {question.gold}", f"( {question.gold} )"):
            assert task.grade(text, question).correct is True, text
        other = "abcde".replace(question.gold, "")[0]
        assert task.grade(f"#### {other}", question).correct is False
        assert all(f"\n{name} ) " in question.text for name in "abcde")
        as_written[task.grade(question.rationale.rsplit("\n", 1)[0], question).correct] += 1
    assert as_written[True] > 7100 and as_written[False] <= 11  # those 11 do name another letter; the rest name none


def test_mathqa_options_are_read_however_they_are_printed():
    plain = {"a": "1 , 2", "b": "3", "c": "1,500", "d": "x ( b )", "e": "none"}
    assert read_options("a ) 1 , 2 , b ) 3 , c ) 1,500 , d ) x ( b ) , e ) none") == plain
    assert read_options(str([f"{name} ) {option}" for name, option in plain.items()])) == plain
    assert read_options("a ) a ) 4 , b ) b ) 5 , c ) 6 , d ) 7 , e ) 8")["b"] == "5"
    assert read_options("a ) 1 , b ) 2 , c ) 3 , d ) 4") is None
    assert read_options("a ) 1 , b ) , c ) 3 , d ) 4 , e ) 5") is None


@needs_data
def test_strategyqa_accepts_every_gold_answer():
    task = released("strategyqa")
    assert len(everything(task)) == 2290 and len(task.questions("test")) == 458
    for question in everything(task):
        other = {"yes": "no", "no": "yes"}[question.gold]
        as_released = str(question.gold == "yes")
        for text in (question.gold, as_released, question.rationale, f"So the answer is {question.gold}."):
            assert task.grade(text, question).correct is True, text
        assert task.grade(f"#### {other}", question).correct is False
        for style in task.styles:
            assert task.grade(task.teach(question, derived(style)), question).correct is True


def test_equal_texts_never_straddle_a_hold_out():
    questions = [tasks.Question(str(i), f"Q {i // 2}", "1", "", 1) for i in range(40)]
    for seed in range(20):
        held, rest = hold_out(questions, 5, seed)
        assert len(held) == 10 and len(rest) == 30 and not {q.text for q in held} & {q.text for q in rest}
        assert held == [question for question in reversed(hold_out(questions[::-1], 5, seed)[0])]
    with pytest.raises(ValueError, match="20 questions to hold out must be fewer than the 20"):
        hold_out(questions, 20, 0)


def gsm8k_files(folder):
    (folder / "gsm8k").mkdir()
    for part, size in (("train", 6), ("test", 3)):
        answers = [f"1+{i} = <<1+{i}={1 + i}>>{1 + i}\n#### {1 + i}" for i in range(size)]
        rows = [{"question": f"{part} {i}\u2028?", "answer": answer} for i, answer in enumerate(answers)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / "gsm8k" / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def gsm8k_params(source):
    return schema.ReleasedParams(name="gsm8k", source=source, train_questions=3, validation_questions=2, split_seed=0)


def test_released_files_are_found_and_their_lack_is_explained(tmp_path, monkeypatch):
    task = gsm8k.Gsm8k
    monkeypatch.delenv("MEML_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="MEML_DATA_DIR is not set: .* gsm8k/"):
        task(gsm8k_params("files")).questions("train")
    monkeypatch.setenv("MEML_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="MEML_DATA_DIR has none of .*train.jsonl"):
        task(gsm8k_params("auto")).questions("train")
    gsm8k_files(tmp_path)
    loaded = task(gsm8k_params("auto"))
    assert [len(loaded.questions(split)) for split in SPLITS] == [3, 2, 3]
    assert [question.id for question in loaded.questions("test")] == ["gsm8k-test-0", "gsm8k-test-1", "gsm8k-test-2"]


def test_the_hub_gives_the_same_questions_and_its_lack_is_explained(tmp_path, monkeypatch):
    import datasets

    gsm8k_files(tmp_path)
    monkeypatch.setenv("MEML_DATA_DIR", str(tmp_path))
    from_files = gsm8k.Gsm8k(gsm8k_params("files"))
    real = datasets.load_dataset
    asked = []

    def local(*name, split):
        asked.append(name)
        file = str(tmp_path / "gsm8k" / f"{split}.jsonl")
        return real("json", data_files=file, split="train", cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert everything(gsm8k.Gsm8k(gsm8k_params("hub"))) == everything(from_files)
    assert set(asked) == {("openai/gsm8k", "main")}

    def offline(*name, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(RuntimeError, match="openai/gsm8k main could not be loaded.*no route.*set MEML_DATA_DIR"):
        gsm8k.Gsm8k(gsm8k_params("hub")).questions("train")


# --- a user's own questions -------------------------------------------------------------------------------------------


def own(path, text, **changes):
    path.write_text(text)
    values = {"answer": "number", "validation_share": 0.2, "test_share": 0.2, "split_seed": 0} | changes
    return jsonl.Jsonl(schema.JsonlParams(name="jsonl", path=str(path), **values))


def test_jsonl_divides_what_names_no_split(tmp_path):
    lines = [json.dumps({"question": f"What is {i} + 1 ?", "answer": i + 1}) for i in range(10)]
    mine = {"id": "mine", "question": "1 + 1 ?", "answer": "2.0", "rationale": "two", "split": "test"}
    lines.append(json.dumps(mine))
    task = own(tmp_path / "sums.jsonl", "\n".join(lines))
    assert [len(task.questions(split)) for split in SPLITS] == [6, 2, 3]
    mine = {question.id: question for question in task.questions("test")}["mine"]
    assert mine == tasks.Question("mine", "1 + 1 ?", "2", "two\n#### 2.0", 1)
    assert task.teach(mine, derived("gold")) == mine.rationale
    assert {"What", "####", "+"} < set(task.words())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"question": "?", "answer": 1, "splt": 1}', "own.jsonl:2: splt=1: .*keys: question, answer"),
        ('{"question": "?"}', "own.jsonl:2: answer=.*required"),
        ('{"question": "?", "answer": "many"}', "own.jsonl:2: answer='many' cannot be read as number"),
        ('{"question": "?", "answer": 1, "split": "dev"}', "own.jsonl:2: split='dev': .*'validation'"),
        ('{"question": 5, "answer": 1}', "own.jsonl:2: question=5: .*string"),
        ('{"question": "1 + 0 ?", "answer": 1}', "own.jsonl:2: question='1 . 0 .' stands in .*own.jsonl:1 already"),
        ("[1]", "own.jsonl:2: line=.1.: "),
        ("{", "own.jsonl:2: line='{': Invalid JSON"),
    ],
)
def test_jsonl_errors_name_file_line_key_and_value(tmp_path, line, complaint):
    task = own(tmp_path / "own.jsonl", '{"question": "1 + 0 ?", "answer": 1}\n' + line)
    with pytest.raises(ValueError, match=complaint):
        task.questions("train")


@pytest.mark.parametrize(
    ("kind", "answer", "good", "bad"),
    [
        ("letter", "C", "answer : c", "#### d"),
        ("yes_no", True, "Yes.", "#### no"),
        ("text", "Paris", "#### paris", "Rome"),
    ],
)
def test_jsonl_reads_answers_as_asked(tmp_path, kind, answer, good, bad):
    task = own(tmp_path / "own.jsonl", json.dumps({"question": "?", "answer": answer}), answer=kind)
    (question,) = task.questions("train")
    assert task.grade(good, question).correct is True
    assert task.grade(bad, question).correct is False
    assert task.grade(question.rationale, question).correct is True


def test_unreadable_is_neither_right_nor_wrong():
    task = world(train_questions=10)
    assert task.grade("5 + 3 = 8", task.questions("train")[0]) == tasks.Graded(None, None)
