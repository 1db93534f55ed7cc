"""Run by test_riel.py under torch.distributed.run: a few steps of stage 2, then what came of them."""

import sys

import torch
from accelerate import Accelerator

sys.path.insert(0, "tests")  # beside this file; the project itself is installed
from test_riel import learner_of, run_params  # noqa: E402

from meml_lib import experts, schema, tasks  # noqa: E402
from meml_lib.training import mef, policy, riel  # noqa: E402


def flat(learned):
    return torch.cat([w.detach().flatten() for w in learned.model.parameters()])


def main(out: str) -> None:
    accelerator = Accelerator(cpu=True)
    task = tasks.load(
        schema.WordProblemsParams(
            name="wordproblems", train_questions=24, validation_questions=4, test_questions=4,
            min_operations=1, max_operations=2, largest_number=30, world_seed=3,
        )
    )  # fmt: skip
    known = {
        name: schema.ExpertParams(system=f"you are {name}", teacher=schema.DerivedTeacher(kind="derived", style=name))
        for name in ("equations", "story")
    }
    panel = experts.load_panel(schema.ExpertsParams(panel=tuple(known), known=known))
    size = schema.ScratchModelParams(
        source="scratch", dtype="float32", hidden_size=32, layers=2, heads=1, mlp_size=64, max_positions=128
    )
    words = [*task.words(), *(word for expert in panel for word in expert.system.split())]
    learned = policy.load(size, device="cpu", words=words, seed=0)
    rows = mef.rows_of(learned, panel, task.questions("train"), experts.teacher_answers(task, panel))
    params = schema.MefParams(
        keep="all", max_answer_tokens=None, answers_per_question=None, allow_test_questions=False,
        epochs=None, steps=30, answers_per_step=15, validate_every=None, patience=None,
        **dict(learner_of(learned).params),
    )  # fmt: skip
    for _ in mef.train(params, learner_of(learned, accelerator), rows, seed=0):
        pass
    start = flat(learned)
    p = run_params(task, panel, steps=4)  # 3 questions a step: uneven over 2 processes
    # The demo's rate. Where a gradient is all rounding, AdamW's first steps are as long as elsewhere, and go either way.
    steps = list(riel.train(p, learned, learner_of(learned, accelerator, lr=3e-4), task, panel))
    if accelerator.is_main_process:
        torch.save(
            {
                "processes": accelerator.num_processes,
                "texts": [row["text"] for s in steps for row in s.rollouts],
                "buffer": [s.metrics["buffer_size"] for s in steps],
                "flushes": steps[-1].metrics["buffer_flushes"],
                "spent": [[s.metrics[k] for k in ("rollouts", "ground_truth_items", "update_tokens")] for s in steps],
                "start": start,
                "weights": flat(learned),
            },
            out,
        )
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
