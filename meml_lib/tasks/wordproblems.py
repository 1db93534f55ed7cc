"""The embedded default: generated multi-step arithmetic stories, small enough for a model trained from scratch.

Texts are lower-case tokens separated by single spaces; every number of a story and of its solutions is a token of its
own in 0..largest_number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

from meml_lib import schema
from meml_lib.tasks import Question, Task, draw
from meml_lib.tasks.reading import number

NAMES = "tom ann ben eva max mia sam zoe leo ida".split()
ITEMS = "apples coins cards shells stamps marbles pens stones".split()
STARTS = ("{name} has {x} {item} .", "{name} starts with {x} {item} .", "at first {name} has {x} {item} .")
ASKS = ("how many {item} does {name} have now ?", "how many {item} are left ?")
PHRASES = {
    "gain": ("{name} finds {n} more .", "{friend} gives {name} {n} more .", "{name} picks up {n} new ones ."),
    "loss": ("{name} loses {n} .", "{name} gives {n} to {friend} .", "{n} of them break ."),
    "groups": (
        "{name} buys {k} bags with {n} each .",
        "{friend} brings {k} boxes of {n} .",
        "{name} gets {k} packs of {n} each .",
    ),
    "doubling": ("{name} doubles that amount .", "soon there are twice as many .", "the pile grows to double size ."),
    "sharing": (
        "{name} splits them evenly among {k} and keeps one share .",
        "{k} people share equally and {name} keeps one part .",
    ),
}
KINDS = tuple(PHRASES)


@dataclass(frozen=True)
class Event:
    """One thing that happens to the amount: n items come or go, or come in k bags; or k people share."""

    kind: str
    n: int = 0
    k: int = 1

    def after(self, x: int) -> int:
        """The amount after the event, sharing rounded down."""
        if self.kind == "sharing":
            return x // self.k
        return x + {"gain": self.n, "loss": -self.n, "groups": self.k * self.n, "doubling": x}[self.kind]

    def fits(self, x: int, largest: int) -> bool:
        """Whether it leaves a whole amount in 1..largest."""
        return 1 <= self.after(x) <= largest and (self.kind != "sharing" or x % self.k == 0)


MISREAD: dict[str, Callable[[Event], Event]] = {
    "gain": lambda event: Event("loss", n=event.n),
    "loss": lambda event: Event("gain", n=event.n),
    "groups": lambda event: Event("gain", n=event.n),  # one bag only
    "doubling": lambda event: Event("gain", n=2),
    "sharing": lambda event: Event("loss", n=event.k),
}
"""What a mistaken teacher takes an event for. Every style then solves the misread story faithfully."""


@dataclass(frozen=True)
class Story(Question):
    """A question with the story behind it."""

    who: str
    start: int
    events: tuple[Event, ...]


def _equations(who: str, start: int, events: tuple[Event, ...], amounts: list[int]) -> str:
    steps = []
    for event, x, y in zip(events, [start, *amounts], amounts):
        if event.kind == "groups":
            steps.append(f"{event.k} * {event.n} = {event.k * event.n}")
        steps.append(f"{x} {_operation(event)} = {y}")
    return " ; ".join(steps)


def _story(who: str, start: int, events: tuple[Event, ...], amounts: list[int]) -> str:
    lines = [f"{who} starts with {start} ."]
    for event, y in zip(events, amounts):
        told = {
            "gain": f"{who} gets {event.n} and has {y} .",
            "loss": f"{who} loses {event.n} and has {y} .",
            "groups": f"{event.k} bags of {event.n} make {event.k * event.n} and {who} has {y} .",
            "doubling": f"{who} doubles and has {y} .",
            "sharing": f"{who} shares by {event.k} and has {y} .",
        }
        lines.append(told[event.kind])
    return " ".join(lines)


def _groups(who: str, start: int, events: tuple[Event, ...], amounts: list[int]) -> str:
    bags = [f"{event.k} * {event.n} = {event.k * event.n} ." for event in events if event.kind == "groups"]
    total = [f"{_operation(event)} = {y}" for event, y in zip(events, amounts)]
    return " ".join([*bags, f"total {start}", *total])


def _operation(event: Event) -> str:
    """The event as operator and number; bags as their whole content."""
    if event.kind == "groups":
        return f"+ {event.k * event.n}"
    return {"gain": f"+ {event.n}", "loss": f"- {event.n}", "doubling": "* 2", "sharing": f"/ {event.k}"}[event.kind]


STYLES = {"equations": _equations, "story": _story, "groups": _groups}


class WordProblems(Task):
    """Stories of min_operations..max_operations events; lengths and kinds of event are uniform.

    Styles: `equations`, an equation a step; `story`, a retelling in words; `groups`, first what all bags hold, then one
    running total. The rationale is the `equations` solution. Splits share no question text. A split does not depend on
    the sizes of the splits drawn after it (test, validation, train), and a smaller split is the head of a larger one.
    """

    params: schema.WordProblemsParams

    def read(self, text: str) -> str | None:
        """The number after the last "####"; nothing else counts, so that an answer cut short is unreadable."""
        return number(text, marked=True)

    def solve(self, story: Story, style: str, misread: Set[int] = frozenset()) -> str:
        """The solution in this style, taking the events at these positions for what `MISREAD` says."""
        events = tuple(MISREAD[e.kind](e) if i in misread else e for i, e in enumerate(story.events))
        amounts = self._amounts(story.start, events)
        return f"{STYLES[style](story.who, story.start, events, amounts)} #### {amounts[-1]}"

    def words(self) -> list[str]:
        """All words, signs and numbers that any question or solution of this world can hold, sorted."""
        templates = [*STARTS, *ASKS, *(phrase for phrases in PHRASES.values() for phrase in phrases)]
        text = [template.format(name="", friend="", item="", x="", n="", k="") for template in templates]
        events = tuple(Event(kind) for kind in KINDS)
        text += [write("", 0, events, [0] * len(events)) for write in STYLES.values()]
        numbers = map(str, range(self.params.largest_number + 1))
        return sorted({*" ".join(text).split(), *NAMES, *ITEMS, *numbers, "####"})

    def _teach(self, question: Story, teacher: schema.DerivedTeacher) -> str:
        kind = teacher.mistaken_on
        if kind is None:
            return self.solve(question, teacher.style)
        if kind not in KINDS:
            raise ValueError(f"mistaken_on={kind!r} is none of the kinds of event {list(KINDS)}")
        misread = {i for i, event in enumerate(question.events) if event.kind == kind}
        if draw(question.id, teacher.style, kind) >= teacher.mistaken_share:
            misread = set()
        # Two mistakes may cancel, or one may not show (2 doubled is 2 + 2): then one mistake alone, if it shows.
        texts = [self.solve(question, teacher.style, chosen) for chosen in (misread, *({i} for i in sorted(misread)))]
        return next((text for text in texts if not self.grade(text, question).correct), texts[0])

    def _amounts(self, start: int, events: tuple[Event, ...]) -> list[int]:
        """The amount after each event, clipped to 0..largest_number, which mistaken amounts may leave."""
        amounts = [start]
        for event in events:
            amounts.append(min(max(event.after(amounts[-1]), 0), self.params.largest_number))
        return amounts[1:]

    def _build(self) -> tuple[dict[str, list[Question]], dict[str, int]]:
        seen: set[str] = set()
        splits = {}
        for split in ("test", "validation", "train"):
            rng = _Draws(f"wordproblems {split} {self.params.world_seed}")
            stories: list[Question] = []
            while len(stories) < getattr(self.params, f"{split}_questions"):
                story = self._story(rng, f"wordproblems-{split}-{len(stories)}")
                if story.text not in seen:  # even one event and numbers to 20 make a million stories
                    seen.add(story.text)
                    stories.append(story)
            splits[split] = stories
        return splits, {}

    def _story(self, rng: _Draws, question_id: str) -> Story:
        start, events = self._events(rng)
        who = rng.choose(NAMES)
        friend, item = rng.choose([name for name in NAMES if name != who]), rng.choose(ITEMS)
        lines = [rng.choose(STARTS).format(name=who, x=start, item=item)]
        for event in events:
            lines.append(rng.choose(PHRASES[event.kind]).format(name=who, friend=friend, n=event.n, k=event.k))
        lines.append(rng.choose(ASKS).format(name=who, item=item))
        gold = str(self._amounts(start, events)[-1])
        story = Story(question_id, " ".join(lines), gold, "", len(events), who, start, events)
        return replace(story, rationale=self.solve(story, "equations"))

    def _events(self, rng: _Draws) -> tuple[int, tuple[Event, ...]]:
        """A start and what follows. Kinds are drawn first and kept, so that none is rarer for fitting less often."""
        while True:
            length = rng.between(self.params.min_operations, self.params.max_operations)
            kinds = [rng.choose(KINDS) for _ in range(length)]
            for _ in range(20_000):  # some plans fit into no narrow range: bags, then doubled thrice, make 40 or more
                x = start = rng.between(1, self.params.largest_number)
                events = []
                for kind in kinds:
                    event = rng.event(kind)
                    if not event.fits(x, self.params.largest_number):
                        break
                    events.append(event)
                    x = event.after(x)
                else:
                    return start, tuple(events)


class _Draws:
    """Uniform draws from `random()`, the one method that Python promises never to change for a given seed."""

    def __init__(self, seed: str):
        self._random = random.Random(int(draw(seed) * 2**48)).random

    def between(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))

    def choose(self, options: Sequence[str]) -> str:
        return options[self.between(0, len(options) - 1)]

    def event(self, kind: str) -> Event:
        """Gains and losses of 1 to 20; 2 to 5 bags of 2 to 9; 2 to 5 shares."""
        if kind in ("gain", "loss"):
            return Event(kind, n=self.between(1, 20))
        if kind == "groups":
            return Event(kind, n=self.between(2, 9), k=self.between(2, 5))
        return Event(kind, k=self.between(2, 5)) if kind == "sharing" else Event(kind)
