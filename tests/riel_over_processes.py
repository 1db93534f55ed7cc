"""Run by ranks.py under torch.distributed.run: a little of stage 1, ten steps of stage 2, then what came of them."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

sys.path.insert(0, "tests")  # beside this file; the project itself is installed
from test_riel import ADAMW, BUFFER, run_params  # noqa: E402

from meml_lib import experts, schema, tasks  # noqa: E402
from meml_lib.training import mef, policy, riel, sharding, stage  # noqa: E402
from meml_lib.training.buffer import HardExampleBuffer  # noqa: E402
from meml_lib.training.learner import Learner  # noqa: E402


def flat(learned):
    return torch.cat([sharding.full(w.detach()).flatten().clone() for w in learned.model.parameters()])


TASK = schema.WordProblemsParams(
    name="wordproblems", train_questions=24, validation_questions=4, test_questions=4,
    min_operations=1, max_operations=2, largest_number=30, world_seed=3,
)  # fmt: skip
KNOWN = {
    name: schema.ExpertParams(system=f"you are {name}", teacher=schema.DerivedTeacher(kind="derived", style=name))
    for name in ("equations", "story")
}
SIZE = schema.ScratchModelParams(
    source="scratch", dtype="float32", hidden_size=48, layers=2, heads=2, mlp_size=96, max_positions=128
)


def learner_of(learned, accelerator, lr, *, optimizer="adamw", sharded=False) -> Learner:
    params = ADAMW.model_copy(update={"lr": lr, "optimizer": optimizer})
    sizes = {"steps": 30, "max_answer_tokens": 24, "micro_batch_tokens": 500}
    return Learner(learned, accelerator, params, sharded=sharded, **sizes)


def stage1(learner: Learner, task, panel, *, steps: int) -> None:
    rows = mef.rows_of(learner.policy, panel, task.questions("train"), experts.teacher_answers(task, panel))
    params = schema.MefParams(
        keep="all", max_answer_tokens=None, answers_per_question=None, allow_test_questions=False,
        epochs=None, steps=steps, answers_per_step=15, validate_every=None, patience=None, **dict(learner.params),
    )  # fmt: skip
    for _ in mef.train(params, learner, rows, seed=0):
        pass


def begin(folder: Path) -> None:
    """A policy that is right now and then, for all layouts to start from."""
    task, panel = tasks.load(TASK), experts.load_panel(schema.ExpertsParams(panel=tuple(KNOWN), known=KNOWN))
    words = [*task.words(), *(word for expert in panel for word in expert.system.split())]
    learned = policy.load(SIZE, device="cpu", words=words, seed=0)
    stage1(learner_of(learned, Accelerator(cpu=True), ADAMW.lr), task, panel, steps=100)
    learned.save(folder)


def main(
    out: str, *, begun: str, optimizer: str, sharded: bool, questions: int, capacity: int, steps: int, dtype: str
) -> None:
    accelerator = Accelerator(cpu=True)
    task, panel = tasks.load(TASK), experts.load_panel(schema.ExpertsParams(panel=tuple(KNOWN), known=KNOWN))
    learned = policy.load_trained(Path(begun), SIZE, device="cpu", seed=0)
    options = {"optimizer": optimizer, "sharded": sharded}
    learned.model.to(getattr(torch, dtype))
    # The demo's rate. Where a gradient is all rounding, AdamW's first steps are as long as elsewhere, and go either way.
    learner = learner_of(learned, accelerator, 3e-4, **options)
    if sharded:
        sharding.check(learner.model, accelerator.num_processes, "the test")
    start = flat(learned)
    stage1(learner, task, panel, steps=3)
    buffers, trained = [], []

    def buffer_of(*sizes):
        buffers.append(HardExampleBuffer(*sizes))
        return buffers[-1]

    riel.HardExampleBuffer = buffer_of
    learner = learner_of(learned, accelerator, 3e-4, **options)
    update = learner.update

    def counted(parts, **options):
        trained.append({part.name: sum(row.count != 0 for row in part.rows) for part in parts})
        return update(parts, **options)

    learner.update = counted
    p = run_params(task, panel, steps=steps, buffer_sft=BUFFER.model_copy(update={"capacity": capacity}))
    p = p.model_copy(update={"riel": p.riel.model_copy(update={"questions_per_step": questions})})
    told = []
    for step in riel.train(p, learned, learner, task, panel):
        spent = {k: step.metrics[k] for k in ("rollouts", "ground_truth_items", "update_tokens", "buffer_flushes")}
        texts = [row["text"] for row in step.rollouts]
        told.append({"texts": texts, "buffer": [list(pair) for pair in buffers[0].held], "spent": spent})
    trained = gather_object([trained])
    weights = flat(learned)
    if accelerator.is_main_process:
        found = {"processes": accelerator.num_processes, "told": told, "trained": trained}
        torch.save({"start": start, "weights": weights, "found": json.dumps(found)}, out)
    stage.end_together(accelerator)


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
