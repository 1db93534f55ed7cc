"""The policy: one language model that answers under every expert's prompt. Load, render, score, save."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from meml_lib.rollouts import products
from meml_lib.schema import HubModelParams, ModelParams, ScratchModelParams
from meml_lib.tasks import hub
from meml_lib.training import sharding

logging.disable_progress_bar()  # of loading and saving weights: seconds at most, and lines in every notebook


@dataclass(frozen=True)
class Row:
    """A prompt and an answer to it, as token ids; the answer's end token included, where it has one."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __post_init__(self):
        if not self.prompt or not self.answer:
            raise ValueError(f"a row needs a prompt and an answer; they have {len(self.prompt)} and {len(self.answer)} tokens")

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.answer)


class Policy:
    """A causal language model, its tokenizer, and how the two meet: rendering, scoring, saving."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.answer_end_id = _answer_end_id(tokenizer)
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        self.end_ids = tuple(sorted({self.answer_end_id, *(i for i in [tokenizer.eos_token_id, *stops] if i is not None)}))
        """Token ids that end an answer: the chat template's own, the tokenizer's and the generation config's."""

    def prompt_ids(self, system: str, question: str) -> tuple[int, ...]:
        """See `render`."""
        return render(self.tokenizer, system, question)

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """An answer to train on, its end token included, so that stopping is learned."""
        return (*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.answer_end_id)

    def text(self, tokens: Iterable[int]) -> str:
        """An answer as text, without special tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    def logits(self, rows: Sequence[Row], *, model: torch.nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model over rows and keep the logits that predict their answers.

        Prompts are padded on the left and answers on the right, so that all answers start at one column. Padding is
        told by lengths, never by token id: with pad = eos an id cannot tell padding from the end token.

        Args:
          rows: N rows. model: the wrapped model (DDP, FSDP) where one trains; None is the bare model.
        Returns: logits_NTV float32 of each answer token, answer_NT ids, mask_NT bool (True on the answer's tokens).
        """
        model = self.model if model is None else model
        left, right = max(len(r.prompt) for r in rows), max(len(r.answer) for r in rows)
        ids = [[0] * (left - len(r.prompt)) + [*r.prompt, *r.answer] + [0] * (right - len(r.answer)) for r in rows]
        device = self.model.device
        ids_NT = torch.tensor(ids, device=device)
        column_T = torch.arange(left + right, device=device)
        start_N = torch.tensor([left - len(r.prompt) for r in rows], device=device)
        end_N = torch.tensor([left + len(r.answer) for r in rows], device=device)
        mask_NT = (column_T >= start_N[:, None]) & (column_T < end_N[:, None])
        with products.in_float32(self.model.dtype, self.model.device):
            out = model(
                input_ids=ids_NT,
                attention_mask=mask_NT.long(),
                position_ids=(column_T - start_N[:, None]).clamp(min=0),
                use_cache=False,
                logits_to_keep=right + 1,
            )
        return out.logits[:, :-1].float(), ids_NT[:, left:], mask_NT[:, left:]

    def score(self, rows: Sequence[Row], *, model: torch.nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of each answer token given its prompt.

        Args: see `logits`.
        Returns: logp_NT in nats (arbitrary where masked), mask_NT bool.
        """
        logits_NTV, answer_NT, mask_NT = self.logits(rows, model=model)
        picked_NT = logits_NTV.gather(-1, answer_NT[..., None])[..., 0]
        return picked_NT - logits_NTV.logsumexp(-1), mask_NT

    def save(self, folder: Path, *, write: bool = True) -> None:
        """Write an ordinary transformers folder: weights, configs, tokenizer, chat template; `generate` ends where we do.

        Adapters are merged; alone they go into a folder `adapter` beside it, for the model that they were trained on.

        Args: write: False in all processes but one; all call it, since divided weights are gathered.
        """
        model = self.model
        if sharding.is_sharded(model):
            model = sharding.plain(model, keep=write)
        elif write and hasattr(model, "merge_and_unload"):
            model = deepcopy(model)
        if not write:
            return
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(folder.with_name("adapter"))
            model = model.merge_and_unload()
        model.generation_config.eos_token_id = list(self.end_ids)
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = self.tokenizer.pad_token_id or self.end_ids[0]
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


# --- rendering --------------------------------------------------------------------------------------------------------


def render(tokenizer: PreTrainedTokenizerBase, system: str, question: str) -> tuple[int, ...]:
    """The prompt of one expert for one question, up to where the answer starts. All prompts come from here.

    - A template with a system role gets the expert's prompt there; this also replaces a template's own default
      system prompt (Qwen, SmolLM2), which stands only where no system message is given.
    - A template that refuses or ignores the system role (Gemma) gets the expert's prompt ahead of the question.
    - Without a template: "system, blank line, question, newline", and a BOS if the tokenizer adds one.
    - A template's text is tokenised without special tokens, since it holds its own BOS (Llama's would be doubled);
      a second BOS that a template writes itself is dropped.

    Raises: ValueError for an empty system prompt or question.
    """
    if not system.strip() or not question.strip():
        raise ValueError(f"system={system!r} and question={question!r} must both hold text")
    if tokenizer.chat_template is None:
        bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        ids = tokenizer(f"{system}\n\n{question}\n", add_special_tokens=False)["input_ids"]
        return (*([tokenizer.bos_token_id] if bos else []), *ids)

    def templated(*messages: tuple[str, str]) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    try:
        text = templated(("system", system), ("user", question))
    except TemplateError:
        text = ""
    if system.strip() not in text:
        text = templated(("user", f"{system}\n\n{question}"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return tuple(ids)


def _answer_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the template closes an answer (Llama's <|eot_id|>, Qwen's <|im_end|>), else eos."""
    if tokenizer.chat_template is not None:
        marker = "7"
        chat = [{"role": "user", "content": "6"}, {"role": "assistant", "content": marker}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        after = tokenizer(text[text.rindex(marker) + len(marker) :].lstrip(), add_special_tokens=False)["input_ids"]
        if after and after[0] in tokenizer.all_special_ids:
            return after[0]
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has neither a chat template that ends answers nor an eos token")
    return tokenizer.eos_token_id


# --- loading ----------------------------------------------------------------------------------------------------------


def load(params: ModelParams, *, device: str, words: Sequence[str], seed: int) -> Policy:
    """Build or load the policy that stage 1 starts from.

    Args:
      params: where the model comes from; LoRA adapters are added where `params.lora` is set.
      device: torch device.
      words: vocabulary of a model made from scratch; unused otherwise.
      seed: of the weights of a model made from scratch and of new adapters.
    """
    torch.manual_seed(seed)
    dtype = getattr(torch, params.dtype)
    if params.source == "scratch":
        tokenizer = word_tokenizer(words)
        model = _scratch_model(params, tokenizer).to(dtype)
    elif params.source == "hub":
        instead, here = "set model.path to a folder that holds the model", Path(params.path).is_dir()
        with hub.asked_for(f"model.path={params.path!r}", instead, here=here):
            tokenizer = AutoTokenizer.from_pretrained(params.path)
            model = AutoModelForCausalLM.from_pretrained(params.path, dtype=dtype)
    else:
        file = gguf_file(params.path)
        folder, options = file.parent, {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        options["quantization_config"] = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    if (lora := params.lora) is not None:
        from peft import LoraConfig, get_peft_model

        modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
        sizes = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
        model = get_peft_model(model, LoraConfig(target_modules=modules, task_type="CAUSAL_LM", **sizes))
    return Policy(model.to(device), tokenizer)


def load_trained(folder: Path, params: ModelParams, *, device: str, seed: int) -> Policy:
    """Load the policy that a stage saved under `folder`, with fresh adapters where LoRA is on."""
    saved = HubModelParams(source="hub", path=str(folder), dtype=params.dtype, lora=params.lora)
    return load(saved, device=device, words=(), seed=seed)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerBase:
    """A word-level tokenizer: one token a whitespace-separated word, with a chat template that has a system role."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:5],
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}<|{{ message.role }}|> {{ message.content }} "
        "{% if message.role == 'assistant' %}<|end|> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}",
    )


def _scratch_model(params: ScratchModelParams, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=params.hidden_size,
            num_hidden_layers=params.layers,
            num_attention_heads=params.heads,
            num_key_value_heads=params.heads,
            intermediate_size=params.mlp_size,
            max_position_embeddings=params.max_positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def gguf_file(path: str) -> Path:
    """A path, or package:NAME for the one .gguf file inside an installed package (found without importing it)."""
    if not path.startswith("package:"):
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"model.path={path!r}: no such file")
        return file
    spec = importlib.util.find_spec(path.removeprefix("package:"))
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if len(files) != 1:
        raise FileNotFoundError(f"model.path={path!r}: found {len(files)} .gguf files; for SmolLM2 run `make smollm2`")
    return files[0]
