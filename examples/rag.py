"""Retrieval-augmented generation that shares prefixes: what many questions need comes first.

Passages that several questions retrieved are put first, in one order, so that their keys and
values are computed once; what only one question retrieved follows in its own branch.

    python -m sps_runtime.launch_server --sp-size 2      # or `make serve`, in another terminal
    python examples/rag.py [URL [CHAT_TEMPLATE]]
"""

import math
import re
import sys
from collections import Counter
from pathlib import Path

import sps_runtime.lang as sgl  # or: import sglang as sgl

DOCUMENT = Path(__file__).parents[1] / "python/sps_runtime/assets/document.txt"
QUESTIONS = [
    "Which room does Diana Ramos have?",
    "Which animal does Bella Moore have?",
    "What is the badge of Jack Taylor?",
    "Please tell me the badge of Michael Archer.",
]
PASSAGES_EACH = 24


class Index:
    """Passages by the words they share with a question, rare words counting more."""

    def __init__(self, passages):
        self.words = [set(re.findall(r"\w+", passage.lower())) for passage in passages]
        seen = Counter(word for words in self.words for word in words)
        self.weight = {word: math.log(len(passages) / count) for word, count in seen.items()}

    def best(self, question, count):
        asked = set(re.findall(r"\w+", question.lower()))
        scores = [sum(self.weight[word] for word in words & asked) for words in self.words]
        return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:count]


@sgl.function
def answer_all(s, shared, own, questions):
    """One branch for each question, after the passages that all of them share."""
    s += sgl.user_begin() + "\n\n".join(shared)
    branches = s.fork(len(questions))
    for branch, passages, question in zip(branches, own, questions, strict=True):
        branch += "".join("\n\n" + passage for passage in passages)
        branch += "\n\n" + question + sgl.user_end()
        branch += sgl.assistant(sgl.gen("answer", max_tokens=32))
    branches.join()
    s["cached_tokens"] = [branch.get_meta_info("answer")["cached_tokens"] for branch in branches]


def retrieve(passages, questions):
    """(numbers of the passages that several questions want, those that each wants alone)."""
    index = Index(passages)
    wanted = [index.best(question, PASSAGES_EACH) for question in questions]
    asked_for = Counter(number for numbers in wanted for number in numbers)
    shared = sorted(number for number, times in asked_for.items() if times > 1)
    own = [sorted(number for number in numbers if asked_for[number] == 1) for numbers in wanted]
    return shared, own


def main(url="http://127.0.0.1:30000", chat_template="chatml"):
    sgl.set_default_backend(sgl.RuntimeEndpoint(url, chat_template_name=chat_template))
    passages = DOCUMENT.read_text().split("\n\n")
    shared, own = retrieve(passages, QUESTIONS)
    state = answer_all.run(
        shared=[passages[number] for number in shared],
        own=[[passages[number] for number in numbers] for numbers in own],
        questions=QUESTIONS,
        temperature=0,
    )
    for question, answer in zip(QUESTIONS, state["answer"], strict=True):
        print(f"{question}\n  {answer}")
    print(f"{len(shared)} shared passages; tokens found computed: {state['cached_tokens']}")
    return {"answers": state["answer"], "cached_tokens": state["cached_tokens"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
