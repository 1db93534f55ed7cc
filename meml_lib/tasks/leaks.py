"""Test questions where none may be: in what a model is trained on."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from meml_lib.tasks import Task, plain

SHORT = 8
"""A question of fewer words could stand in another text by chance: it counts only where it is a whole text or line."""


def test_questions_in(task: Task, texts: Sequence[str]) -> list[tuple[int, str]]:
    """Which texts hold a question of the test split, word for word; neither case nor spaces count.

    Only texts that hold a question's rarest word are compared with it, so that many texts take seconds.

    Returns: (place of the text, id of the test question), text by text.
    """
    wanted = {plain(question.text): question.id for question in task.questions("test")}
    short = {question for question in wanted if len(question.split()) < SHORT}
    texts_with = Counter(word for text in texts for word in set(plain(text).split()))
    by_word = defaultdict(list)
    for question in wanted.keys() - short:
        inner = question.split()[1:-1]  # a text may put quotes around the others
        by_word[min(inner, key=texts_with.__getitem__)].append(question)
    found = []
    for place, text in enumerate(texts):
        whole = plain(text)
        near = (question for word in by_word.keys() & whole.split() for question in by_word[word] if question in whole)
        held = {question for question in near if re.search(rf"(?<!\w){re.escape(question)}(?!\w)", whole)}
        held |= short & {whole, *map(plain, text.splitlines())} if short else set()
        found += [(place, wanted[question]) for question in sorted(held)]
    return found
