"""Run by test_sharding.py and test_cuda.py, also under torch.distributed.run: small updates of every kind of model."""

import copy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, "tests")  # beside this file; the project itself is installed
from riel_over_processes import KNOWN, SIZE, TASK  # noqa: E402
from test_riel import ADAMW, SAMPLING  # noqa: E402

from meml_lib import experts, schema, tasks  # noqa: E402
from meml_lib.rollouts import decoder  # noqa: E402
from meml_lib.training import losses, mef, policy, sharding, stage  # noqa: E402
from meml_lib.training.ask import ask  # noqa: E402
from meml_lib.training.learner import Learner  # noqa: E402
from meml_lib.training.keeping import Best  # noqa: E402

KINDS = [(dtype, lora, again) for dtype in ("float32", "bfloat16") for lora in (False, True) for again in (False, True)]
"""Precision, LoRA, gradient checkpointing."""
DEVICE = "cpu"


def setting():
    return tasks.load(TASK), experts.load_panel(schema.ExpertsParams(panel=tuple(KNOWN), known=KNOWN))


def policy_of(dtype="float32", lora=False, again=False) -> policy.Policy:
    task, panel = setting()
    words = [*task.words(), *(word for expert in panel for word in expert.system.split())]
    adapters = schema.LoraParams(rank=3, alpha=6) if lora else None  # of 2 processes, one holds 2 rows of it
    learned = policy.load(SIZE.model_copy(update={"dtype": dtype, "lora": adapters}), device=DEVICE, words=words, seed=0)
    if again:
        learned.model.gradient_checkpointing_enable({"use_reentrant": False})
    return learned


def learner_of(learned, accelerator, *, sharded=False, optimizer="adamw", max_grad_norm=0.5) -> Learner:
    params = ADAMW.model_copy(update={"lr": 3e-4, "optimizer": optimizer, "max_grad_norm": max_grad_norm})
    sizes = {"steps": 10, "max_answer_tokens": 24, "micro_batch_tokens": 200}
    return Learner(learned, accelerator, params, sharded=sharded, **sizes)


def steps(learner: Learner, count: int) -> list[dict]:
    """Updates on five rows: one process has three of them."""
    task, panel = setting()
    questions = task.questions("train")[:5]
    answers = experts.teacher_answers(task, panel, questions=questions)
    rows = mef.rows_of(learner.policy, panel, questions, answers)[::2]
    rank, processes = learner.accelerator.process_index, learner.accelerator.num_processes
    return [learner.update([losses.mef(rows[rank::processes])]) for _ in range(count)]


def whole(model) -> dict[str, torch.Tensor]:
    return {name: sharding.full(weight.detach()).float().cpu().clone() for name, weight in model.named_parameters()}


def exact(learner) -> dict[str, torch.Tensor]:
    """All weights; of those that train, what the optimiser holds: a step may be lost in a bfloat16 weight."""
    copies = {name: sharding.full(master).cpu().clone() for name, master in learner._masters.items()}
    return whole(learner.policy.model) | copies


def updates(accelerator: Accelerator, *, sharded: bool) -> dict:
    """Two updates of each kind of model. Returns: kind -> what came of it."""
    found = {}
    for kind in KINDS:
        learned = policy_of(*kind)
        passes = []
        layer = sharding.layers(learned.model)[0].self_attn
        layer.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        learner = learner_of(learned, accelerator, sharded=sharded)
        if sharded:
            sharding.check(learner.model, accelerator.num_processes, "the test")
        before = exact(learner)
        records = steps(learner, 2)
        after = exact(learner)
        masters = {str(master.dtype) for master in learner._masters.values()}
        found[kind] = {"records": records, "before": before, "after": after, "masters": masters, "passes": len(passes)}
    return found


def restored(accelerator: Accelerator, *, sharded: bool) -> dict:
    """Four updates, and two, a state that travels, and two more by a learner made anew."""
    found = {}
    for optimizer, dtype in (("adamw", "float32"), ("adamw", "bfloat16"), ("muon", "float32")):
        learner = learner_of(policy_of(dtype), accelerator, sharded=sharded, optimizer=optimizer)
        steps(learner, 2)
        state = copy.deepcopy(learner.state())
        steps(learner, 2)
        again = learner_of(policy_of(dtype), accelerator, sharded=sharded, optimizer=optimizer)
        again.restore(*copy.deepcopy(state))
        steps(again, 2)
        found[optimizer, dtype] = {"state": tuple(state), "through": whole(learner.model), "again": whole(again.model)}
    return found


def faults(accelerator: Accelerator) -> dict[str, str]:
    """What is said of layouts that are not what was asked for."""
    said = {}
    parallel = accelerator.prepare_model(policy_of().model)
    adapters = learner_of(policy_of(lora=True), accelerator).state()
    for name, fault in (
        ("data parallel", lambda: sharding.check(parallel, 2, "fsdp.yaml")),
        ("another model", lambda: learner_of(policy_of(), accelerator).restore(*adapters)),
    ):
        try:
            fault()
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)
    return said


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=DEVICE == "cpu")
    main_process = accelerator.is_main_process
    found = {"ddp": updates(accelerator, sharded=False), "fsdp": updates(accelerator, sharded=True)}
    found["restored"] = restored(accelerator, sharded=True)
    found["faults"] = faults(accelerator)

    learned = policy_of()
    learner = learner_of(learned, accelerator, sharded=True)
    held = sum(sharding.local(weight).numel() for weight in learned.model.parameters())
    found["held"] = accelerator.gather(torch.tensor([held], device=DEVICE)).tolist()
    best = Best(learned, patience=1)
    best.see(0.5)
    kept = whole(learned.model)
    steps(learner, 1)
    found["moved"] = any(not torch.equal(kept[name], now) for name, now in whole(learned.model).items())
    best.restore()
    found["best"] = all(torch.equal(kept[name], now) for name, now in whole(learned.model).items())

    # Processes that ask two questions, one and none, by both ways of sampling; then an update, which is collective.
    task, panel = setting()
    for name in ("decoder", "forward"):
        fits, decoder.fits = decoder.fits, (decoder.fits if name == "decoder" else lambda *_: False)
        for share in ([2, 0], [1, 2]):
            questions = task.questions("train")[: share[accelerator.process_index]]
            asked = ask(learned, task, panel, questions, SAMPLING, rollouts=2, key=(0,))
            found[f"{name} {share}"] = [row["text"] for row in asked.rows]
        decoder.fits = fits
    found["after asking"] = [record["grad_norm"] for record in steps(learner, 2)]

    for name, lora in (("saved", False), ("merged", True)):
        learned = policy_of(lora=lora)
        learner = learner_of(learned, accelerator, sharded=True)
        steps(learner, 2)
        learned.save(folder / name, write=main_process)
        found[name] = whole(learned.model)
    if main_process:
        torch.save(found, folder / "found.pt")
    stage.end_together(accelerator)


if __name__ == "__main__":
    DEVICE = sys.argv[2]
    main(Path(sys.argv[1]))
