"""Stage 2 on a model of 20,000 weights: what a step samples, credits, buffers and learns."""

import copy
import dataclasses
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from meml_lib import config, experts, schema
from meml_lib.training import evaluate, mef, riel
from meml_lib.training.ask import ask
from meml_lib.training.learner import Learner
from meml_lib.training.policy import Policy, Row

ADAMW = schema.OptimizerParams(
    optimizer="adamw", lr=3e-3, weight_decay=0.0, warmup_steps=0, decay="constant", max_grad_norm=None
)
GRPO = schema.GrpoParams(weight=1.0, advantage="positive", scale="none", divide_by="constant")
MUTUAL = schema.MutualParams(weight=0.1, form="forward_kl", divide_by="tokens")
BUFFER = schema.BufferSftParams(weight=1.0, capacity=8, wrong_over=2, update="own_step", divide_by="tokens")
SAMPLING = schema.SamplingParams(temperature=1.0, top_p=None, max_answer_tokens=24, rows_per_batch=64)


NO_LIMIT = schema.StopAtParams(rollouts=None, ground_truth_items=None, update_tokens=None)


def run_params(task, panel, *, seed=0, steps=3, stop_at=NO_LIMIT, **objective):
    parts = {"grpo": GRPO, "mutual": MUTUAL, "buffer_sft": BUFFER} | objective
    return schema.RunParams.model_construct(
        task=task.params,
        sampling=SAMPLING,
        riel=schema.RielParams(
            steps=steps,
            stop_at=stop_at,
            questions_per_step=3,
            rollouts_per_expert=4,
            **dict(ADAMW),
            objective=schema.ObjectiveParams(**parts),
            validate_every=None,
            patience=None,
        ),
        seed=seed,
    )


def learner_of(policy, accelerator=None, *, steps=10, lr=ADAMW.lr):
    accelerator = accelerator or Accelerator(cpu=True)
    params = ADAMW.model_copy(update={"lr": lr})
    return Learner(policy, accelerator, params, steps=steps, max_answer_tokens=24, micro_batch_tokens=2000)


@pytest.fixture(scope="module")
def trained(task, panel):
    """A policy after a short stage 1, right now and then, so that groups are mixed."""
    from meml_lib.training import policy

    words = [*task.words(), *(word for expert in panel for word in expert.system.split())]
    size = schema.ScratchModelParams(
        source="scratch", dtype="float32", hidden_size=48, layers=2, heads=2, mlp_size=96, max_positions=128
    )
    learned = policy.load(size, device="cpu", words=words, seed=0)
    questions = task.questions("train")[:12]
    rows = mef.rows_of(learned, panel, questions, experts.teacher_answers(task, panel, questions=questions))
    params = schema.MefParams(
        keep="all", max_answer_tokens=None, answers_per_question=None, allow_test_questions=False,
        epochs=None, steps=60, answers_per_step=18, **dict(ADAMW), validate_every=None, patience=None
    )
    losses = [record["loss"] for record in mef.train(params, learner_of(learned, steps=60), rows, seed=0)]
    assert losses[-1] < 0.6 * losses[0]
    return learned


def twin(policy):
    return Policy(copy.deepcopy(policy.model), policy.tokenizer)


def train(trained, task, panel, **options):
    policy, p = twin(trained), run_params(task, panel, **options)
    steps = list(riel.train(p, policy, learner_of(policy), task, panel))
    return steps, torch.cat([w.detach().flatten() for w in policy.model.parameters()])


def test_every_rollout_of_a_group_has_a_draw_of_its_own(policy, task, panel):
    questions = task.questions("train")[:2]
    asked = ask(policy, task, panel, questions, SAMPLING, rollouts=4, key=(0, 0))
    for groups in asked.rollouts_BEG:
        for group in groups:
            assert len({rollout.tokens for rollout in group}) == 4
    again = ask(policy, task, panel, questions, SAMPLING, rollouts=4, key=(0, 0))
    other = ask(policy, task, panel, questions, SAMPLING, rollouts=4, key=(1, 0))
    assert again.rows == asked.rows
    assert other.rows != asked.rows


def test_asked_rows_and_rewards_stand_in_question_expert_rollout_order(policy, task, panel):
    questions = task.questions("train")[:2]
    asked = ask(policy, task, panel, questions, SAMPLING, rollouts=2, key=(0,))
    keys = [(row["question_id"], row["expert"], row["sample"]) for row in asked.rows]
    assert keys == [(q.id, e.name, g) for q in questions for e in panel for g in range(2)]
    assert asked.rewards_BEG.shape == (2, 3, 2)
    for row, rollout in zip(asked.rows, (r for groups in asked.rollouts_BEG for g in groups for r in g), strict=True):
        assert row["text"] == policy.text(rollout.tokens) and row["tokens"] == len(rollout.tokens)


def test_a_truncated_answer_is_unreadable_whatever_it_holds(policy, task, panel, monkeypatch):
    question = task.questions("train")[0]
    monkeypatch.setattr(policy, "text", lambda tokens: question.rationale)
    asked = ask(policy, task, panel, [question], SAMPLING, rollouts=8, key=(0,))
    assert {row["ended"] for row in asked.rows} == {True, False}
    for row in asked.rows:
        assert row["correct"] is (True if row["ended"] else None)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(trained, task, panel):
    (steps, weights), (again, same), (_, other) = (
        train(trained, task, panel, seed=0),
        train(trained, task, panel, seed=0),
        train(trained, task, panel, seed=1),
    )
    assert torch.equal(weights, same) and not torch.equal(weights, other)
    assert [s.rollouts for s in steps] == [s.rollouts for s in again]


def test_metrics_count_groups_by_question_and_expert(panel):
    rewards = [[1, 1], [1, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]
    rows = [
        {"correct": bool(reward) if reward else None, "tokens": 5, "ended": True}
        for question in rewards
        for group in question
        for reward in group
    ]
    summary = riel.summary(rows, panel, 2)
    expected = {"groups_all_right": 1 / 6, "groups_mixed": 1 / 6, "groups_all_wrong": 4 / 6, "questions_all_wrong": 1 / 2}
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert [summary[f"reward/{e.name}"] for e in panel] == pytest.approx([0.5, 0.25, 0.0])
    assert summary["unreadable"] == 9 / 12


def test_the_buffer_fills_flushes_and_teaches_ground_truth(trained, task, panel):
    steps, weights = train(trained, task, panel, steps=4)
    flushes = [s.metrics["buffer_flushes"] for s in steps]
    kept = sum(s.metrics["rows/buffer_sft"] for s in steps) + steps[-1].metrics["buffer_size"]
    offers = sum(
        sum(row["correct"] is not True for row in s.rollouts[start : start + 4]) > 2
        for s in steps
        for start in range(0, len(s.rollouts), 4)
    )
    assert flushes[-1] >= 1
    assert 0.2 * offers < kept < 0.9 * offers  # each kept with chance 2 / 4
    for step in steps:
        flushed = step.metrics["rows/buffer_sft"] > 0
        assert flushed == ("grad_norm/buffer_sft" in step.metrics)
        assert step.metrics["buffer_size"] < BUFFER.capacity
    _, without = train(trained, task, panel, steps=4, buffer_sft=None)
    assert not torch.equal(weights, without)


def test_a_budget_ends_stage_2_after_the_step_that_reaches_it(trained, task, panel):
    free, _ = train(trained, task, panel, steps=4)
    spent = {name: [step.metrics[name] for step in free] for name, _ in NO_LIMIT}
    assert spent["rollouts"] == [36, 72, 108, 144]  # 3 questions x 3 experts x 4
    assert spent["ground_truth_items"] == [BUFFER.capacity * step.metrics["buffer_flushes"] for step in free]
    assert spent["ground_truth_items"][-1] > 0
    trained_rows = sum(s.metrics["rows/grpo"] + s.metrics["rows/mutual"] + s.metrics["rows/buffer_sft"] for s in free)
    assert 10 * trained_rows < spent["update_tokens"][-1] < 80 * trained_rows  # prompts of 20 to 50 tokens, answers of 24
    for name, values in spent.items():
        first = next(step for step, value in enumerate(values) if value > 0)
        for most, steps in ((values[first], first + 1), (values[-1], values.index(values[-1]) + 1), (values[-1] + 1, 4)):
            limited, _ = train(trained, task, panel, steps=4, stop_at=NO_LIMIT.model_copy(update={name: most}))
            assert len(limited) == steps, (name, most)
    weighs_nothing, _ = train(trained, task, panel, steps=4, mutual=None, buffer_sft=None)
    assert weighs_nothing[-1].metrics["update_tokens"] < spent["update_tokens"][-1]


def test_in_the_sum_the_buffer_takes_no_step_of_its_own(trained, task, panel):
    own, _ = train(trained, task, panel, steps=2)
    summed, _ = train(trained, task, panel, steps=2, buffer_sft=BUFFER.model_copy(update={"update": "in_sum"}))
    first_flush = next(i for i, s in enumerate(own) if s.metrics["rows/buffer_sft"])
    assert summed[first_flush].metrics["rows/buffer_sft"] == own[first_flush].metrics["rows/buffer_sft"]
    assert "grad_norm/buffer_sft" not in summed[first_flush].metrics


@pytest.mark.parametrize("form", ["forward_kl", "k2", "token_kl", "literal"])
def test_mutual_learning_moves_the_worst_expert_as_its_form_says(trained, task, panel, form):
    """One step of mutual learning alone: O+ becomes likelier under the worst expert, or less likely if literal."""
    from meml_lib.training import losses

    policy = twin(trained)
    questions = task.questions("train")[:12]
    asked = ask(policy, task, panel, questions, SAMPLING, rollouts=4, key=(0, 0))
    experts = riel.best_and_worst(asked.rewards_BEG, torch.rand(12, 3))
    options = MUTUAL.model_copy(update={"form": form, "weight": 1.0})
    part = losses.mutual(options, asked.rewards_BEG, asked.rollouts_BEG, asked.prompts_BE, experts)
    rows = [r.row for r in part.rows if form != "literal" or r.count < 0]  # under the worst expert; literal has others too
    assert rows, "the fixture's policy must have a best expert on some question"

    def likelihood():
        policy.model.eval()
        with torch.no_grad():
            logp_NT, mask_NT = policy.score(rows)
        return logp_NT[mask_NT].mean().item()

    before = likelihood()
    learner = Learner(
        policy, Accelerator(cpu=True), ADAMW.model_copy(update={"lr": 1e-4}), steps=1, max_answer_tokens=24, micro_batch_tokens=400
    )
    record = learner.update([part])
    assert record["rows/mutual"] == len(part.rows)
    assert (likelihood() > before) is (form != "literal")


def test_every_teachers_answers_are_scored_under_every_prompt(trained, task, panel, tmp_path):
    p = SimpleNamespace(
        evaluate=SimpleNamespace(validation_questions=4),
        hardware=SimpleNamespace(micro_batch_tokens=90),
        mef=config.load_run("smoke.yaml").mef,
    )

    def likelihoods(panel):
        answers = evaluate.answered_by_all_teachers(p, trained, task, panel)
        return evaluate.prompt_teacher(p, trained, task, panel, answers, Accelerator(cpu=True))

    table = likelihoods(panel)
    assert list(table["split"].unique()) == ["validation"]
    assert list(table["question_id"].unique()) == [question.id for question in task.questions("validation")[:4]]
    assert len(table) == 4 * 3 * 3 and not table.duplicated(["question_id", "prompt", "teacher"]).any()
    answers = experts.teacher_answers(task, panel, questions=task.questions("validation")[:4])
    systems = {expert.name: expert.system for expert in panel}
    texts = {question.id: question.text for question in task.questions("validation")}
    for found in table.itertuples():
        answer = answers.query("question_id == @found.question_id and expert == @found.teacher")["text"].item()
        row = Row(trained.prompt_ids(systems[found.prompt], texts[found.question_id]), trained.answer_ids(answer))
        logp_1T, _ = trained.score([row])
        assert found.logp == pytest.approx(logp_1T.sum().item(), abs=1e-3) and found.tokens == len(row.answer)
    own = table[table["prompt"] == table["teacher"]]
    assert (own["logp"].sum() / own["tokens"].sum()) > (table["logp"].sum() / table["tokens"].sum())

    file = tmp_path / "answers.csv"  # a teacher of training questions alone
    asked = task.questions("train")[:2]
    pd.DataFrame({"question_id": [q.id for q in asked], "text": "#### 1"}).to_csv(file, index=False)
    other = dataclasses.replace(panel[0], teacher=schema.TableTeacher(kind="table", path=str(file), model="x"))
    table = likelihoods(experts.Panel([other, panel[1]]))
    assert list(table["split"].unique()) == ["train"] and (table["teacher"] == "equations").sum() == 2 * 2
    pd.DataFrame({"question_id": [task.questions("test")[0].id], "text": "#### 1"}).to_csv(file, index=False)
    with pytest.raises(ValueError, match=r"\['equations', 'story'\] have no answered question in common"):
        likelihoods(experts.Panel([other, panel[1]]))
