"""Ask teachers of `kind: api` for their answers, over any OpenAI-compatible endpoint: `meml collect`, 00_experts.

The `openai` client waits, retries and times out (`collect.retries`, `collect.timeout_s`); what finally fails is
counted by kind, is no answer, and is asked again by the next run:

| what happens | what is done |
|---|---|
| 429, 408, 409, 500 and above | retried, after Retry-After where it is given (over 120 s: not retried) |
| the connection drops, a reply is cut short, silence for timeout_s | retried |
| no JSON, no choice, another shape (200) | "bad reply"; not retried |
| 401, 403: the key is refused; 402, insufficient_quota: no money; 404: no such model | that teacher stops |
| a reply names another model (`store.accepted`) | stored under its name, not used; that teacher stops |
| another 4xx | counted |
| no connection, after the retries: the server does not run | that teacher stops |
| 10 failures in a row, 2 x concurrency where that is more | that teacher stops |
| a budget is reached | nothing more is asked; what is under way is kept |
| Ctrl-C, SIGTERM | requests under way are given up; what had arrived is stored |
| finish_reason other than stop | stored with ended = False; an empty answer is stored as "" |
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import html
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, closing
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2
import openai
from pydantic import BaseModel, Field, ValidationError

from meml_lib import config, runs, schema, tasks
from meml_lib.experts import tables
from meml_lib.experts.store import Store, accepted, asked_name, failures, fingerprint, lines, stored, values

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Collected", "accepted", "fingerprint", "run", "stored"]


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """Reasoning included."""


class _Reply(BaseModel):
    """What is read of a chat completion; the client's own class would let a reply without choices pass."""

    model: str | None = None
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass
class _Teacher:
    """A teacher, and what became of its requests in this run."""

    expert: str
    params: schema.ApiTeacher
    key: str | None = field(default=None, repr=False)
    asked: int = 0
    """Answers that are wanted, those stored before included."""
    before: int = 0
    new: int = 0
    in_a_row: int = 0
    stopped: list[str] = field(default_factory=list)
    """Why nothing more is asked of it."""
    failed: Counter[str] = field(default_factory=Counter)
    """Kind -> requests given up."""
    retried: Counter[str] = field(default_factory=Counter)
    """Kind -> HTTP requests that went wrong, retried or not."""
    example: dict[str, str] = field(default_factory=dict)
    """Kind -> what the endpoint said of one of them."""
    spent: Counter[str] = field(default_factory=Counter)

    @cached_property
    def path(self) -> Path:
        """Of its store; teachers may name one store in several ways."""
        return config.locate(self.params.path).resolve()

    def stop(self, reason: str) -> None:
        self.stopped += [reason] if reason not in self.stopped else []

    def cost(self, prompt_tokens: int, answer_tokens: int) -> float | None:
        """In the currency of the price; None: no price."""
        price = self.params.price
        return price and (prompt_tokens * price.input + answer_tokens * price.output) / 1e6


class _Request(NamedTuple):
    teacher: _Teacher
    question: tasks.Question
    sample: int

    @property
    def body(self) -> dict[str, Any]:
        p = self.teacher.params
        messages = [{"role": "system", "content": p.system}] if p.system else []
        body = {
            "model": asked_name(p),
            "messages": [*messages, {"role": "user", "content": self.question.text}],
            "temperature": p.temperature,
            "top_p": p.top_p,
            "max_tokens": p.max_answer_tokens,
        }
        return {key: value for key, value in (body | p.extra).items() if value is not None}

    def names(self) -> dict[str, Any]:
        """What a line of the store is found by."""
        asked = fingerprint(self.teacher.params, self.question.text)
        return {"question_id": self.question.id, "expert": self.teacher.expert, "sample": self.sample, "asked": asked}

    def most(self) -> Counter[str]:
        """What it spends at most: a token of the prompt is at least a byte of it."""
        body = self.body
        prompt = 64 + sum(len(message["content"].encode()) for message in body["messages"])
        limits = (body.get(name, 0) for name in ("max_tokens", "max_completion_tokens"))  # `extra` may set both
        answer = max(self.teacher.params.max_answer_tokens, *limits)
        return Counter(requests=1, tokens=prompt + answer, money=self.teacher.cost(prompt, answer) or 0)


class _BudgetReached(Exception):
    """The next request could exceed a bound."""


class _Budget:
    """What was spent, and what requests under way may spend yet."""

    def __init__(self, bounds: schema.BudgetParams, spent: Counter[str]):
        self.bounds = {name: most for name, most in bounds if most is not None}
        self.spent, self.held, self.reached = spent, Counter(), None
        self._freed = asyncio.Event()

    def _short(self, need: Counter[str]) -> str | None:
        total = self.spent + self.held + need
        return next((name for name, most in self.bounds.items() if total[name] > most), None)

    async def hold(self, need: Counter[str]) -> None:
        """Wait until `need` fits. Raises: _BudgetReached if it does not fit with nothing under way."""
        while short := self._short(need):
            if self.reached or not self.held["requests"]:  # of money, rounding may be left
                self.reached = self.reached or short
                self._freed.set()
                raise _BudgetReached(short)
            self._freed.clear()
            await self._freed.wait()
        self.held += need

    def hold_retry(self) -> None:
        """Raises: _BudgetReached; a retry does not wait."""
        if short := self._short(Counter(requests=1)):
            self.reached = short
            raise _BudgetReached(short)
        self.held["requests"] += 1

    def settle(self, held: Counter[str], spent: Counter[str]) -> None:
        """Nothing is awaited: an interruption could lose the answer that was paid for."""
        self.held -= held
        self.spent += spent
        self._freed.set()

    def __str__(self) -> str:
        return ", ".join(f"{name} {self.spent[name]:,.10g} of {most:,.10g}" for name, most in self.bounds.items())


@dataclass
class _Call:
    """A request under way: the HTTP requests it has taken, counted where they are sent."""

    teacher: _Teacher
    budget: _Budget
    sent: int = 0


_CALL: ContextVar[_Call] = ContextVar("call")


class _Http(openai.DefaultAsyncHttpxClient):
    """The client's own; counts each HTTP request, and ends it after timeout_s seconds whatever trickles in."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        call = _CALL.get()
        if call.sent:
            call.budget.hold_retry()
        call.sent += 1
        try:
            async with asyncio.timeout(self.timeout.read):
                response = await super().send(request, **options)
        except (TimeoutError, httpx2.TimeoutException) as error:
            silence = httpx2.ReadTimeout("no whole reply in time", request=request)
            call.teacher.retried[_kind(silence)] += 1
            raise silence from error
        except httpx2.TransportError as error:
            call.teacher.retried[_kind(error)] += 1
            raise
        if response.status_code >= 400:
            call.teacher.retried[f"HTTP {response.status_code}"] += 1
        return response


def _kind(error: BaseException | None) -> str:
    """What became of an HTTP request that brought no response."""
    if isinstance(error, httpx2.TimeoutException):
        return "silence"
    return "no connection" if isinstance(error, httpx2.ConnectError) else "dropped connection"


@dataclass(frozen=True)
class Collected:
    """What a run of collecting did."""

    table: pd.DataFrame
    """One row an expert: expert, model, asked (answers wanted), before (stored by earlier runs), new, missing,
    requests (HTTP, retries included), went_wrong (HTTP requests by kind, retried or not), failed (given up, by kind),
    prompt_tokens, answer_tokens, cost, seconds (of the whole run)."""
    messages: tuple[str, ...]
    """Why a teacher or the run stopped, and an example of each kind of failure."""

    @property
    def missing(self) -> int:
        """Answers that are not stored; the next run asks for them."""
        return int(self.table["missing"].sum())

    def __str__(self) -> str:
        return "\n".join([self.table.to_string(index=False, na_rep="-"), *self.messages])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False, na_rep="-") + "".join(f"<p>{html.escape(m)}</p>" for m in self.messages)


def run(p: config.Run) -> Collected:
    """Ask the panel's `kind: api` teachers for the answers to the training questions that their stores lack.

    Works in a notebook too: the event loop runs in a thread of its own, the progress is shown by the caller's.

    Raises: ParamsError naming the environment variable of a key that is needed and not set; runs.InUse while another
      process collects into the same file; ValueError for a store with a broken line; OSError if the disk fails.
    """
    known = [(name, p.experts.known[name].teacher) for name in p.experts.panel]
    teachers = [_Teacher(name, teacher) for name, teacher in known if isinstance(teacher, schema.ApiTeacher)]
    paths = sorted({teacher.path for teacher in teachers})
    questions = tasks.load(p.task).questions("train") if teachers else []
    with ExitStack() as locks:
        for path in paths:
            locks.enter_context(runs.locked(path.with_name(f".{path.name}.lock"), str(path)))
        collecting = _Collecting(p, teachers, questions)
        if collecting.done < collecting.total:
            collecting.open_stores(locks)
            _in_a_thread(collecting)
    return collecting.summary()


def _in_a_thread(collecting: _Collecting) -> None:
    progress = runs.Progress("collect", "answer")
    with concurrent.futures.ThreadPoolExecutor(1) as thread, closing(progress):
        future = thread.submit(asyncio.run, collecting.main())
        try:
            while not future.done():
                progress.show(collecting.done, collecting.total, collecting.standing())
                concurrent.futures.wait([future], timeout=0.5)
            progress.show(collecting.done, collecting.total, collecting.standing())
        finally:  # interrupted: what has arrived is still stored
            collecting.cancel()
        future.result()


class _Collecting:
    """One run: what is missing, and the workers that ask for it."""

    def __init__(self, p: config.Run, teachers: list[_Teacher], questions: list[tasks.Question]):
        self.p, self.teachers, self.questions = p.collect, teachers, questions
        self.seconds = 0.0
        self._task: tuple[asyncio.AbstractEventLoop, asyncio.Task] | None = None
        self._cancelled = False
        self._there: set[tuple[str, str, int]] = set()
        self._stores: dict[tuple[str, bool], Store] = {}
        self._clients: dict[tuple[str, str | None], openai.AsyncOpenAI] = {}
        self._spent_before = Counter()
        self._look()
        self._secrets = self._keys()
        self._budget: _Budget | None = None

    def _look(self) -> None:
        """What the stores hold already, and what of it was asked with other values."""
        named = {teacher.expert: teacher for teacher in self.teachers}
        asked = {(t.expert, q.id): fingerprint(t.params, q.text) for t in self.teachers for q in self.questions}
        otherwise: dict[tuple[str, str, int], str] = {}
        for path in dict.fromkeys(teacher.path for teacher in self.teachers):
            for record in chain(lines(path), lines(failures(path))):
                self._spent_before += _spending(record)
                key = record["expert"], record["question_id"], record["sample"]
                teacher = named.get(key[0])
                if key[:2] not in asked or teacher.path != path or "failed" in record:
                    continue
                if record["asked"] == asked[key[:2]]:
                    self._there |= {key} if accepted(teacher.params, record) else set()
                else:
                    now = values(teacher.params)
                    changed = [name for name in now if record.get("values", {}).get(name) != now[name]]
                    otherwise[key] = ", ".join(changed) or "the question's text"
        for teacher in self.teachers:
            wanted = [(teacher.expert, q.id, n) for q in self.questions for n in range(teacher.params.samples)]
            teacher.asked, teacher.before = len(wanted), sum(key in self._there for key in wanted)
            changes = Counter(otherwise[key] for key in wanted if key in otherwise and key not in self._there)
            for names, count in changes.items():
                told = f"{count} stored answers are not used and are asked anew, because of another value of {names}"
                print(f"{teacher.expert}: {told}")

    def _keys(self) -> dict[str, str]:
        """Key -> what stands for it wherever it would be written; short keys could be words of an answer: left.

        A key is written into JSON as it is: quotes and backslashes, which no key has, are refused.
        """
        secrets = {}
        for teacher in self.teachers:
            name = teacher.params.key_from
            if name is None or teacher.before == teacher.asked:
                continue
            teacher.key = os.environ.get(name, "").strip()
            if not teacher.key or not re.fullmatch(r"[!#-\[\]-~]+", teacher.key):
                what = f"{name} is not set" if not teacher.key else f"{name} holds characters that no key has"
                place = f"experts.known.{teacher.expert}.teacher.key_from"
                raise config.ParamsError(f"{place}: the environment variable {what}")
            if len(teacher.key) >= 8:
                secrets[teacher.key] = f"[{name}]"
        return secrets

    def open_stores(self, stack: ExitStack) -> None:
        """For as long as the stack lives."""
        for path, failed in product({teacher.path for teacher in self.teachers}, (False, True)):
            self._stores[path, failed] = store = Store(failures(path) if failed else path)
            stack.callback(store.close)
            if store.torn:
                print(f"{config.label_of(path)}: its last line was torn ({store.torn} bytes); it is cut off, and asked again")

    def clean(self, text: str) -> str:
        """The text without any key."""
        for key, stand_in in self._secrets.items():
            text = text.replace(key, stand_in)
        return text

    def cancel(self) -> None:
        """From another thread; nothing happens once it is over."""
        self._cancelled = True
        if self._task and not self._task[1].done():
            self._task[0].call_soon_threadsafe(self._task[1].cancel)

    async def main(self) -> None:
        self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._budget = _Budget(self.p.budget, self._spent_before)
        started = time.monotonic()
        async with AsyncExitStack() as clients:
            for place in {(teacher.params.base_url, teacher.key) for teacher in self.teachers}:
                client = openai.AsyncOpenAI(
                    base_url=place[0],
                    api_key=place[1] or "none",
                    max_retries=self.p.retries,
                    timeout=self.p.timeout_s,
                    http_client=_Http(timeout=self.p.timeout_s),
                )
                self._clients[place] = await clients.enter_async_context(client)
            requests = self._requests()
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(self.p.concurrency, self.total - self.done)):
                        workers.create_task(self._work(requests))
            except BaseExceptionGroup as group:  # of the first worker that failed; the others were ended for it
                raise group.exceptions[0] from None
            finally:
                self.seconds = time.monotonic() - started

    def _requests(self) -> Iterator[_Request]:
        for question in self.questions:
            for teacher in self.teachers:
                for sample in range(teacher.params.samples):
                    if self._budget.reached or self._cancelled:
                        return
                    if not teacher.stopped and (teacher.expert, question.id, sample) not in self._there:
                        yield _Request(teacher, question, sample)

    async def _work(self, requests: Iterator[_Request]) -> None:
        for request in requests:
            most = request.most()
            try:
                await self._budget.hold(most)
            except _BudgetReached:
                return
            call = _Call(request.teacher, self._budget)
            _CALL.set(call)
            record: dict[str, Any] = {"failed": "interrupted", "said": ""}
            try:
                if not request.teacher.stopped:  # it may have waited
                    record = await self._ask(request)
            finally:
                record["requests"] = call.sent
                request.teacher.spent += (spent := _spending(record))
                self._budget.settle(most + Counter(requests=max(0, call.sent - 1)), spent)
                store = self._stores[request.teacher.path, "failed" in record]
                if call.sent:
                    store.put(self.clean(json.dumps(request.names() | record, ensure_ascii=False)))
            if call.sent:
                await store.sync()
                self._count(request.teacher, record)

    async def _ask(self, request: _Request) -> dict[str, Any]:
        """The record of an answer; of a failure its kind, under `failed`."""
        teacher, started = request.teacher, time.monotonic()
        client = self._clients[teacher.params.base_url, teacher.key]
        try:
            reply = await client.post("/chat/completions", body=request.body, cast_to=httpx2.Response)
            reply = _Reply.model_validate_json(reply.content)
        except _BudgetReached:
            return {"failed": "budget", "said": "no request was left for a retry"}
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            return {"failed": "bad reply", "said": f"{'.'.join(map(str, fault['loc'])) or 'reply'}: {fault['msg']}"}
        except openai.OpenAIError as error:
            return self._failure(teacher, error)
        seconds, message = time.monotonic() - started, reply.choices[0].message
        text, reasoning, thought = message.content or "", message.reasoning_content or message.reasoning, True
        if not reasoning:
            reasoning, text, thought = tables.apart(text)
        finish, usage = reply.choices[0].finish_reason, reply.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        counted = None not in tokens
        return {
            "text": text,
            "reasoning": reasoning,
            "ended": thought and finish in ("stop", "eos", None),
            "finish_reason": finish,
            "model": reply.model,
            "prompt_tokens": tokens[0],
            "answer_tokens": tokens[1],
            "cost": teacher.cost(*tokens) if counted else None,
            "seconds": round(seconds, 3),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "values": values(teacher.params),
        }

    def _failure(self, teacher: _Teacher, error: openai.OpenAIError) -> dict[str, Any]:
        p, said = teacher.params, ""
        if isinstance(error, openai.APIStatusError):
            kind, code, said = f"HTTP {error.status_code}", error.status_code, self.clean(error.message)[:300]
            if code in (401, 403):
                key = f"the key in {p.key_from} was refused" if p.key_from else "it asks for a key: set key_from"
                teacher.stop(f"{p.base_url}: {key} ({kind})")
                said = ""
            elif code == 404:
                teacher.stop(f"{p.base_url} knows no model {asked_name(p)!r}, or is no API's address ({kind})")
            elif code == 402 or error.code == "insufficient_quota":
                teacher.stop(f"{p.base_url}: the account has nothing left to spend ({kind})")
        elif (kind := _kind(error.__cause__)) == "no connection":
            teacher.stop(f"{p.base_url}: {error.__cause__}; does the server run?")
        return {"failed": kind, "said": said}

    def _count(self, teacher: _Teacher, record: dict[str, Any]) -> None:
        if kind := record.get("failed"):
            teacher.failed[kind] += 1
            teacher.example.setdefault(kind, record["said"])
            teacher.in_a_row += kind != "budget"
            if teacher.in_a_row >= max(10, 2 * self.p.concurrency):
                teacher.stop("too many failures in a row")
            return
        teacher.in_a_row = 0
        if not accepted(teacher.params, record):
            teacher.failed["another model"] += 1
            teacher.stop(
                f"replies name the model {self.clean(record['model'])!r}, not {asked_name(teacher.params)!r}: if that is"
                f" meant, set experts.known.{teacher.expert}.teacher.replies_as, and the stored replies count"
            )
            return
        teacher.new += 1
        if record["answer_tokens"] is None and {"tokens", "money"} & self._budget.bounds.keys():
            teacher.stop("replies do not say how many tokens they took: no budget of tokens or money can be kept")

    # --- what is said ---------------------------------------------------------------------------------------------

    @property
    def done(self) -> int:
        return sum(teacher.before + teacher.new for teacher in self.teachers)

    @property
    def total(self) -> int:
        """Answers that this run may still end with: a stopped teacher gives no more."""
        return sum(t.before + t.new if t.stopped else t.asked for t in self.teachers)

    def standing(self) -> str:
        """Cost so far and projected; without prices, tokens."""
        new = sum(teacher.new for teacher in self.teachers)
        now = {unit: sum(teacher.spent[unit] for teacher in self.teachers) for unit in ("money", "tokens")}
        unit = "money" if now["money"] else "tokens"
        whole = now[unit] * (1 + (self.total - self.done) / new) if new else 0
        figures = [f"{value:.4g}" if unit == "money" else f"{value:,.0f} tokens" for value in (now[unit], whole)]
        stopped = ", ".join(teacher.expert for teacher in self.teachers if teacher.stopped)
        said = f"{'cost ' if unit == 'money' else ''}{figures[0]}" + (f", about {figures[1]} in all" if new else "")
        return said + (f"; stopped: {stopped}" if stopped else "")

    def summary(self) -> Collected:
        import pandas as pd

        rows, messages = [], []
        for t in self.teachers:
            rows.append(
                {
                    "expert": t.expert,
                    "model": t.params.model,
                    "asked": t.asked,
                    "before": t.before,
                    "new": t.new,
                    "missing": t.asked - t.before - t.new,
                    "requests": t.spent["requests"],
                    "went_wrong": _counts(t.retried),
                    "failed": _counts(t.failed),
                    "prompt_tokens": t.spent["prompt_tokens"],
                    "answer_tokens": t.spent["tokens"] - t.spent["prompt_tokens"],
                    "cost": t.spent["money"] if t.params.price else None,
                    "seconds": round(self.seconds, 1),
                }
            )
            messages += [f"{t.expert} stopped: {reason}" for reason in t.stopped]
            messages += [f"{t.expert}, {kind}: {said}" for kind, said in t.example.items() if said]
        if self._budget and self._budget.reached:
            name = self._budget.reached
            messages.append(f"the budget of {name} is reached: {self._budget} spent, earlier runs included")
        columns = list(rows[0]) if rows else ["expert", "asked", "missing"]
        return Collected(pd.DataFrame(rows, columns=columns), tuple(messages))


def _spending(record: dict[str, Any]) -> Counter[str]:
    """What a record spent, in the units of the budget."""
    prompt, answer = record.get("prompt_tokens") or 0, record.get("answer_tokens") or 0
    money, requests = record.get("cost") or 0, record.get("requests", 0)
    return Counter(requests=requests, tokens=prompt + answer, prompt_tokens=prompt, money=money)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in counter.items()) or "-"
