"""The values of a run and of a study: every key with its type, unit, bound and the paper's value.

The values themselves live in `params/`; `config` composes the files and validates them against these classes.
"Paper" is MEML-GRPO, arXiv 2508.09670.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A frozen group of values; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


# --- task -------------------------------------------------------------------------------------------------------------


class WordProblemsParams(Section):
    """Generated multi-step arithmetic stories: the embedded default."""

    name: Literal["wordproblems"]
    train_questions: PositiveInt
    validation_questions: PositiveInt
    test_questions: PositiveInt
    min_operations: Annotated[int, Field(ge=1, le=4)]
    """Fewest events of a story; its difficulty is its number of events."""
    max_operations: Annotated[int, Field(ge=1, le=4)]
    largest_number: Annotated[int, Field(ge=20, le=1000)]
    """No number in a story or in its solution exceeds this."""
    world_seed: NonNegativeInt
    """Seed of the questions; apart from the run's seed, so that all runs answer the same questions."""

    @model_validator(mode="after")
    def _ordered(self):
        if self.min_operations > self.max_operations:
            raise ValueError(f"min_operations={self.min_operations} must be <= max_operations={self.max_operations}")
        return self


class ReleasedParams(Section):
    """A public data set, from its released files (under MEML_DATA_DIR) or from the hub."""

    name: Literal["gsm8k", "mathqa", "strategyqa"]
    source: Literal["auto", "files", "hub"]
    """auto: files where MEML_DATA_DIR is set, else the hub."""
    train_questions: PositiveInt | None
    """At most this many training questions, drawn with split_seed; null: all."""
    validation_questions: PositiveInt
    """Held out of the released training questions."""
    split_seed: NonNegativeInt


class JsonlParams(Section):
    """A user's own questions: one JSON object a line, {id?, question, answer, rationale?, split?, difficulty?}."""

    name: Literal["jsonl"]
    path: Text
    answer: Literal["number", "letter", "yes_no", "text"]
    """How an answer is read and compared."""
    validation_share: Share
    """Of the lines that name no split."""
    test_share: Share
    split_seed: NonNegativeInt


class Gsm8kResplitParams(Section):
    """GSM8K's 1,319 TEST questions, split anew by question: for answers that were published for these alone. Not
    comparable with any result on GSM8K's own test split."""

    name: Literal["gsm8k-test-resplit"]
    source: Literal["auto", "files", "hub"]
    train_questions: PositiveInt | None
    """At most this many training questions, drawn with split_seed; null: all that the other two splits leave."""
    validation_questions: PositiveInt
    test_questions: PositiveInt
    split_seed: NonNegativeInt


TaskParams = Annotated[
    WordProblemsParams | ReleasedParams | Gsm8kResplitParams | JsonlParams, Field(discriminator="name")
]


_OF_GSM8K = ("gold", "equations", "program")
STYLES = {
    "wordproblems": ("equations", "story", "groups"),
    "gsm8k": _OF_GSM8K,
    "gsm8k-test-resplit": _OF_GSM8K,
    "mathqa": ("gold", "formula", "plain"),
    "strategyqa": ("gold", "decomposition", "plain"),
    "jsonl": ("gold",),
}
"""Task -> the ways in which it can write a solution."""
MISTAKES = {"wordproblems": ("gain", "loss", "groups", "doubling", "sharing")}
"""Task -> the kinds of event that a teacher can get wrong."""


# --- experts ----------------------------------------------------------------------------------------------------------


class DerivedTeacher(Section):
    """A teacher whose answers the task writes itself, out of its own gold solutions."""

    kind: Literal["derived"]
    style: Text
    """One of STYLES[task.name]."""
    mistaken_on: Text | None = None
    """One of MISTAKES[task.name], the kind of event that this teacher gets wrong; null: never wrong."""
    mistaken_share: Share = 1.0
    """Share of the questions with such an event in which it makes its mistake."""


class HubTable(Section):
    """A data set of answers on the hub, or in a local folder that `datasets.load_dataset` reads."""

    name: Text
    config: Text | None = None
    split: Text = "train"


class ColumnsParams(Section):
    """Where a table of answers holds what. A value with braces is a template over the row, as for `str.format`:
    "gsm8k-test-{question_row}", "{gpt[solution]}"; without, it is a column's name."""

    question_id: Text | None = "question_id"
    """The task's id of the question; null: the question is found by its text."""
    question: Text | None = None
    """The question's text; read only where question_id is null. Case and spaces do not count."""
    text: Text = "text"
    """The answer, final answer included."""
    reasoning: Text | None = None
    """What the teacher thought before it answered; null: not apart. <think>..</think> at a text's start is set apart anyway."""
    ended: Text | None = None
    """true, "stop" or "eos": the answer is whole; any other value: it was cut off. null: all are whole."""

    @model_validator(mode="after")
    def _the_question_is_named_once(self):
        if (self.question_id is None) == (self.question is None):
            raise ValueError("give one of columns.question_id and columns.question; set question_id: null to find by text")
        return self


class _Answers(Section):
    model: Text
    """Who wrote the answers, e.g. deepseek-r1: what is asked for, and what the report compares with the paper's teachers."""
    reasoning: Literal["drop", "prepend"] = "drop"
    """prepend: stage 1 learns "<think>reasoning</think>" before the answer. The paper does not say."""


class TableTeacher(_Answers):
    """A teacher whose answers stand in a table: parquet, CSV, JSONL, or a data set of the hub."""

    kind: Literal["table"]
    path: Text | None = None
    """Exactly one of path and hub. $MEML_DATA_DIR is replaced by its value."""
    hub: HubTable | None = None
    where: dict[str, str | int | float | bool] = {}
    """Column -> value of the rows that are this teacher's; {}: all rows."""
    columns: ColumnsParams = ColumnsParams()

    @model_validator(mode="after")
    def _one_source(self):
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"give exactly one of path={self.path!r} and hub={self.hub!r}")
        return self


class PriceParams(Section):
    """What an endpoint charges, in the currency of collect.budget.money, per million tokens."""

    input: NonNegativeFloat
    output: NonNegativeFloat
    """Of reasoning and answer tokens."""


class ApiTeacher(_Answers):
    """A teacher that is asked over an OpenAI-compatible API, by `meml collect FILE` or notebook 00_experts."""

    kind: Literal["api"]
    path: Text
    """JSONL to which each answer is appended as it arrives; teachers may share it. Asked again only if a value of the
    request changes: model, system, temperature, top_p, max_answer_tokens, extra, or the question's text."""
    base_url: str
    """e.g. https://api.deepseek.com/v1; no credentials in it."""
    key_from: str | None = None
    """NAME of the environment variable that holds the API key, never the key; null: the endpoint asks for none."""
    api_model: Text | None = None
    """The endpoint's own name of the model, e.g. deepseek-reasoner; null: `model`."""
    system: Text | None = None
    """What the teacher is told before the question (the expert's own prompt is not shown to it); null: nothing."""
    samples: PositiveInt = 1
    """Answers to each question."""
    temperature: NonNegativeFloat | None = None
    """null: the endpoint's own, as for all values of the request."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    max_answer_tokens: PositiveInt
    """Reasoning included; a longer answer is cut off, and counts as unreadable."""
    extra: dict[str, object] = {}
    """More fields of the request's body, e.g. {thinking: {type: enabled}}; null takes a field out of it. Where an endpoint
    wants the limit under its newer name: {max_tokens: null, max_completion_tokens: 8192}."""
    replies_as: Text | None = None
    """The model that replies name where that is another one than was asked for (an alias, an Ark endpoint)."""
    price: PriceParams | None = None
    """null: not known; then collect.budget.money must be null."""

    @field_validator("key_from", mode="before")
    @classmethod
    def _a_name_is_no_key(cls, value):
        if value is not None and not (isinstance(value, str) and re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", value)):
            raise ValueError("must name an environment variable (capitals, digits, underscores), e.g. OPENAI_API_KEY")
        return value

    @field_validator("base_url", mode="before")
    @classmethod
    def _no_credentials(cls, value):
        if not (isinstance(value, str) and re.fullmatch(r"https?://[^@?\s]+", value)):  # a message would show the value
            raise ValueError("must be http(s)://HOST/PATH without user, password, query or key")
        return value

    @field_validator("extra")
    @classmethod
    def _one_whole_answer(cls, value):
        if taken := sorted(value.keys() & {"model", "messages", "n", "stream"}):
            raise ValueError(f"must not set {taken}: one whole answer of `model` is asked for at a time")
        return value


Teacher = Annotated[DerivedTeacher | TableTeacher | ApiTeacher, Field(discriminator="kind")]


class ExpertParams(Section):
    """A system prompt and the teacher whose answers it is trained on."""

    system: Text
    """System prompt. Paper: "You are Expert i, ..." (only paraphrases are known)."""
    teacher: Teacher


class ExpertsParams(Section):
    """The panel: which experts answer, in which order."""

    panel: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Names; this order is axis E everywhere. Paper: N = 3."""
    only: tuple[NonNegativeInt, ...] | None = None
    """Positions in the panel of the experts that take part, so that arms need not name them; null: all. The resolved
    values hold the reduced panel, and null here."""
    known: dict[str, ExpertParams]

    @model_validator(mode="before")
    @classmethod
    def _reduced(cls, values):
        only, panel = (values.get("only"), values.get("panel")) if isinstance(values, dict) else (None, None)
        if not (isinstance(only, (list, tuple)) and isinstance(panel, (list, tuple))):
            return values
        if not only or any(type(place) is not int or not 0 <= place < len(panel) for place in only):
            raise ValueError(f"only={list(only)} must hold positions 0 to {len(panel) - 1} of the panel {list(panel)}")
        return values | {"panel": [panel[place] for place in only], "only": None}

    @model_validator(mode="after")
    def _panel_is_known(self):
        for name in self.panel:
            if name not in self.known:
                raise ValueError(f"panel names {name!r}, which experts.known lacks; it has {sorted(self.known)}")
        if len(set(self.panel)) < len(self.panel):
            raise ValueError(f"panel={list(self.panel)} names an expert twice")
        return self


# --- model ------------------------------------------------------------------------------------------------------------


class LoraParams(Section):
    """Low-rank adapters (peft) instead of full fine-tuning."""

    rank: PositiveInt
    alpha: PositiveFloat
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


class _Model(Section):
    dtype: Literal["float32", "bfloat16"]
    """Of the weights and of all passes."""
    lora: LoraParams | None = None
    """null: full fine-tuning."""


class ScratchModelParams(_Model):
    """A Llama-shaped model trained from scratch, with a word-level tokenizer of its own."""

    source: Literal["scratch"]
    hidden_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    mlp_size: PositiveInt
    max_positions: PositiveInt
    """Longest prompt + answer, in tokens."""

    @model_validator(mode="after")
    def _heads_share_the_width(self):
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 2 x heads={self.heads}")
        return self


class HubModelParams(_Model):
    """A hub name or a local folder, as transformers saves them."""

    source: Literal["hub"]
    path: Text
    config: dict[str, object] | None = None
    """Its public config.json, for a dry run without a download; a run reads the model's own."""


class GgufModelParams(_Model):
    """A GGUF file, dequantised on loading. `package:NAME` finds the file inside an installed Python package."""

    source: Literal["gguf"]
    path: Text


ModelParams = Annotated[ScratchModelParams | HubModelParams | GgufModelParams, Field(discriminator="source")]


# --- sampling, optimiser ----------------------------------------------------------------------------------------------


class SamplingParams(Section):
    """How a training rollout is drawn."""

    temperature: PositiveFloat | None
    """null: greedy. Paper: not given."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """Nucleus; null: off. Paper: not given."""
    max_answer_tokens: PositiveInt
    """An answer that has not ended by then is truncated. Paper: not given."""
    rows_per_batch: PositiveInt
    """Rollouts that are decoded side by side; bounds memory, changes no draw of the native engine."""
    engine: Literal["native", "vllm"] = "native"
    """vllm: an optional package; other draws of the same distribution, and no entropy."""


class OptimizerParams(Section):
    """One optimiser and its learning-rate schedule: a part of each stage's values."""

    optimizer: Literal["adamw", "muon"]
    """muon: torch.optim.Muon for the hidden matrices, AdamW for embeddings, norms and biases."""
    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup_steps: NonNegativeInt
    decay: Literal["constant", "linear", "cosine"]
    """After the warm-up, down to 0 at the last step ("constant": none)."""
    max_grad_norm: PositiveFloat | None
    """Global norm to which gradients are clipped; null: off."""


class StageParams(OptimizerParams):
    """What both stages have."""

    validate_every: PositiveInt | None
    """Steps between validations; null: only at the end."""
    patience: PositiveInt | None
    """Stop after this many validations without a better mean accuracy, and keep the best weights; null: off."""

    @model_validator(mode="after")
    def _patience_sees_validations(self):
        if self.patience is not None and self.validate_every is None:
            raise ValueError(f"patience={self.patience} needs validate_every, which is null")
        return self


# --- stage 1 ----------------------------------------------------------------------------------------------------------


class MefParams(StageParams):
    """Stage 1, multi-expert supervised fine-tuning (eq. 4)."""

    keep: Literal["all", "right"]
    """Which teachers' answers are trained on. Eq. 4 as printed keeps wrong ones: all. Cut-off and empty ones never are."""
    max_answer_tokens: PositiveInt | None
    """Longer answers are left out of training; null: none is."""
    answers_per_question: PositiveInt | None
    """At most this many of an expert's answers to one question, the first that the other filters leave; null: all."""
    allow_test_questions: bool
    """false: training answers that hold a question of the test split are an error."""
    epochs: PositiveFloat | None
    """Passes over the teachers' answers. Exactly one of epochs and steps. Paper: 1 epoch."""
    steps: PositiveInt | None
    answers_per_step: PositiveInt
    """Batch size. Paper: not given (sibling paper: 32)."""

    @model_validator(mode="after")
    def _one_length(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give exactly one of epochs={self.epochs} and steps={self.steps}; set the other to null")
        return self


# --- stage 2 ----------------------------------------------------------------------------------------------------------

Divisor = Literal["constant", "answer", "tokens"]


class GrpoParams(Section):
    """Policy gradient on each expert's own rollouts (eq. 5, 6); GRPO and Dr.GRPO are other values of it."""

    weight: NonNegativeFloat
    advantage: Literal["positive", "signed"]
    """positive: max(A, 0), eq. 6. signed: GRPO and Dr.GRPO."""
    scale: Literal["none", "std"]
    """none: reward - mean, eq. 5. std: that over the group's standard deviation (GRPO)."""
    divide_by: Divisor
    """constant: rows x max answer tokens (MEML, Dr.GRPO). answer: rows x each answer's tokens (GRPO)."""


class MutualParams(Section):
    """The worst expert learns the best expert's right rollouts (eq. 7-9)."""

    weight: NonNegativeFloat
    """lambda1. Paper: not given."""
    form: Literal["forward_kl", "token_kl", "k2", "literal"]
    """forward_kl: eq. 9 with the usable sign, best expert detached. literal: as printed (expected to fail)."""
    divide_by: Divisor
    """tokens: the step's mutual-learning tokens, so that lambda1 is per token."""


class BufferSftParams(Section):
    """Hard-example buffer: questions that stay wrong trigger a supervised step on ground truth."""

    weight: NonNegativeFloat
    """lambda2. Paper: not given."""
    capacity: PositiveInt
    """Examples that fill the buffer and trigger the supervised step. Paper: B = 64."""
    wrong_over: NonNegativeInt
    """An expert with MORE wrong rollouts than this offers the question; kept with chance wrong_over / G. Paper: K = 6 of G = 8."""
    update: Literal["own_step", "in_sum"]
    """own_step: an optimiser step of its own after the rollouts' step. in_sum: a part of eq. 10's sum. Paper: not given."""
    divide_by: Divisor


class ObjectiveParams(Section):
    """Eq. 10: loss name -> weight and options; null leaves the loss out."""

    grpo: GrpoParams | None
    mutual: MutualParams | None
    buffer_sft: BufferSftParams | None


class StopAtParams(Section):
    """Budgets: stage 2 ends after the first step that reaches one, so that arms can be matched in it. null: no limit."""

    rollouts: PositiveInt | None
    ground_truth_items: PositiveInt | None
    """Answers that the buffer's supervised steps were made of."""
    update_tokens: PositiveInt | None
    """Tokens, prompts included, of the rows that counted in a loss."""


class RielParams(StageParams):
    """Stage 2, reinforcement learning in which experts learn from each other."""

    steps: PositiveInt
    """With stop_at: at most."""
    stop_at: StopAtParams
    questions_per_step: PositiveInt
    """Over all processes. Paper: not given (sibling paper: 8)."""
    rollouts_per_expert: Annotated[int, Field(ge=2)]
    """G, for each question and expert. Paper: 8."""
    objective: ObjectiveParams

    @model_validator(mode="after")
    def _a_budget_does_not_cut_a_schedule(self):
        set_ = [name for name, most in self.stop_at if most is not None]
        if set_ and self.decay != "constant":
            raise ValueError(f"stop_at.{set_[0]} would cut decay={self.decay} short of its end; use decay=constant")
        return self

    @model_validator(mode="after")
    def _buffer_can_fill(self):
        sft, group = self.objective.buffer_sft, self.rollouts_per_expert
        if sft is not None and not sft.wrong_over < group:
            raise ValueError(f"objective.buffer_sft.wrong_over={sft.wrong_over} must be < rollouts_per_expert={group}")
        return self


# --- collecting -------------------------------------------------------------------------------------------------------


class BudgetParams(Section):
    """Where collecting stops, over all runs that wrote to the same files; null: no limit. A request starts only if its
    longest possible answer still fits."""

    requests: PositiveInt | None
    """HTTP requests, the client's retries included."""
    tokens: PositiveInt | None
    """Prompt and answer tokens, as the endpoints count them."""
    money: PositiveFloat | None
    """In the currency of the teachers' prices."""


class CollectParams(Section):
    """How answers are asked of `kind: api` teachers. None of it changes an answer."""

    concurrency: PositiveInt
    """Requests under way at a time, over all teachers."""
    timeout_s: PositiveFloat
    """Of one request."""
    retries: NonNegativeInt
    """Of one request that failed for a passing reason (429, 5xx, a dropped connection, silence)."""
    budget: BudgetParams


# --- evaluation, hardware, run ----------------------------------------------------------------------------------------


class EvaluateParams(Section):
    """What is measured after each stage."""

    validation_questions: PositiveInt
    """For choosing anything: the best expert, early stopping, learning rates."""
    test_questions: PositiveInt | None
    """null: all."""
    samples_per_expert: NonNegativeInt
    """Sampled answers for pass@k, at the training temperature; 0 leaves pass@k out."""


Tracker = Literal["tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"]


class CheckpointParams(Section):
    """What a training that is killed goes on from; changes no update."""

    every: PositiveInt | None
    """Steps between checkpoints; there is one after the last step too, and one on SIGTERM. null: none at all."""
    kept: PositiveInt
    """The newest ones, while it trains."""
    kept_when_done: NonNegativeInt
    """The same once the stage is done: for go_on."""
    go_on: bool
    """true: a stage whose steps, stop_at, lr or its schedule were changed goes on from its last checkpoint, and the manifest
    says so; false: it is trained anew."""


class HardwareParams(Section):
    """Where and how the work runs; changes no update."""

    device: Literal["auto", "cpu", "cuda"]
    threads: PositiveInt | None
    """CPU threads of one process; null: torch's own choice."""
    processes: PositiveInt
    """1 trains in process; more by accelerate."""
    accelerate_config: Text | None = None
    """An accelerate config file (FSDP, several machines); null: plain data parallel."""
    micro_batch_tokens: PositiveInt
    """Tokens of one forward and backward pass; a prompt counts once for all of its answers there."""
    gradient_checkpointing: bool
    """Compute each layer again on the way back instead of keeping what it made: less memory, about a third more time."""
    cell_timeout_s: PositiveFloat | None
    """A notebook's cell that runs longer fails its job, when run by `meml run`; null: never."""
    job_timeout_s: PositiveFloat | None
    """The same for a whole job (one notebook)."""
    checkpoints: CheckpointParams


class ClusterProfile(Section):
    """What a cluster is asked for, for each job of a study (`meml run STUDY --profile NAME`); changes no result."""

    partition: Text | None
    """null: the cluster's default."""
    account: Text | None
    """null: asked of Slurm."""
    time_minutes: PositiveInt
    """Of one job."""
    memory_mb: PositiveInt
    cpus: PositiveInt | None
    """null: hardware.threads of each process."""
    gpus: NonNegativeInt | None
    """null: hardware.processes where hardware.device is cuda, else none."""
    retries: NonNegativeInt
    """Starts again after a job was killed, ran out of time or lost its node; never after its own failure."""
    requeue: bool
    """Whether Slurm itself starts a preempted job again."""
    grace_s: Annotated[int, Field(ge=0, le=65535)]
    """A job is told (SIGTERM) so long before its time ends. Slurm's own bound."""
    check_every_s: Annotated[int, Field(ge=1, le=100)]
    """Between looks at the queue. Slurm forgets ended jobs after MinJobAge, 300 s unless set otherwise."""
    sbatch_options: Text | None
    """More of sbatch's options, in one text."""


class TrackingParams(Section):
    """Where else a step's record goes, beside metrics.jsonl; changes no update."""

    trackers: tuple[Tracker, ...]
    """accelerate's names; each needs its own package. tensorboard's files lie in the stage's folder."""
    project: Text
    """The name under which services that need one file the run."""
    profile_steps: NonNegativeInt
    """Steps of each stage, after its first two, whose time is taken apart into STAGE/profile/; 0: none."""


class RunParams(Section):
    """All values of one run: one arm, one seed."""

    task: TaskParams
    experts: ExpertsParams
    model: ModelParams
    collect: CollectParams
    sampling: SamplingParams
    mef: MefParams
    riel: RielParams
    evaluate: EvaluateParams
    hardware: HardwareParams
    tracking: TrackingParams
    seed: NonNegativeInt

    @model_validator(mode="after")
    def _counts_fit(self):
        for name in ("validation_questions", "test_questions"):
            there, asked = getattr(self.task, name, None), getattr(self.evaluate, name)
            if there and asked and asked > there:
                raise ValueError(f"evaluate.{name}={asked} exceeds task.{name}={there}")
        if self.sampling.engine == "vllm" and (self.hardware.processes > 1 or self.hardware.accelerate_config):
            alone = "hardware.processes=1 and accelerate_config=null"
            raise ValueError(f"sampling.engine=vllm runs inside one process: set {alone}, or take native")
        return self

    @model_validator(mode="after")
    def _teachers_fit_the_task(self):
        for name in self.experts.panel:
            teacher, place = self.experts.known[name].teacher, f"experts.known.{name}.teacher"
            if teacher.kind != "derived":
                continue
            task = self.task.name
            styles, mistakes = STYLES[task], MISTAKES.get(task, ())
            if teacher.style not in styles:
                raise ValueError(f"{place}.style={teacher.style!r} is none of the styles {list(styles)} of {task}")
            if teacher.mistaken_on is not None and teacher.mistaken_on not in mistakes:
                known = f"is none of {list(mistakes)}" if mistakes else f"must be null: {task} has no kinds of mistake"
                raise ValueError(f"{place}.mistaken_on={teacher.mistaken_on!r} {known}")
        return self

    @model_validator(mode="after")
    def _money_needs_prices(self):
        for name in self.experts.panel if self.collect.budget.money else ():
            if isinstance(teacher := self.experts.known[name].teacher, ApiTeacher) and teacher.price is None:
                raise ValueError(f"collect.budget.money needs experts.known.{name}.teacher.price, which is null")
        return self


class ArmParams(Section):
    """One training configuration of a study: a few values that differ from the study's run file."""

    label: Text
    """As tables and figures name it."""
    overrides: dict[str, object] = {}
    """Dotted key -> value, e.g. riel.objective.mutual: null."""
    last_stage: Literal["mef", "riel"] = "riel"
    """mef: supervised fine-tuning only."""


class Comparison(NamedTuple):
    """The difference arm - against in one measure, each after its last stage."""

    table: str
    """The comparisons of one table are one family of tests."""
    arm: str
    against: str
    measure: str


Measure = Annotated[str, Field(pattern=r"^(mean_expert|best_validation|vote|expert-\d+)$")]
"""expert-N: accuracy under the prompt of the expert at position N of the run file's panel."""


class StudyParams(Section):
    """Arms x seeds over one run file, and the report on them."""

    title: Text
    run_file: Text
    """Relative to params/."""
    overrides: dict[str, object] = {}
    """Dotted key -> value, for all arms."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    arms: Annotated[dict[str, ArmParams], Field(min_length=1)]
    compare: dict[Text, dict[str, dict[str, Measure | None]]] = {}
    """Table -> arm -> baseline arm -> measure (null: none): the differences that the report states, decided before the
    study runs."""
    notes: str = ""
    """What the study does and does not show, in Markdown; stands in the report."""

    @model_validator(mode="after")
    def _pairs_are_arms(self):
        for pair in self.comparisons:
            for name in {pair.arm, pair.against} - self.arms.keys():
                key = f"compare.{pair.table}.{pair.arm}.{pair.against}"
                raise ValueError(f"{key} names {name!r}, which is no arm; the arms are {list(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} holds a seed twice")
        return self

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """All differences that the report states, table by table."""
        return tuple(
            Comparison(table, arm, against, measure)
            for table, arms in self.compare.items()
            for arm, baselines in arms.items()
            for against, measure in baselines.items()
            if measure
        )
