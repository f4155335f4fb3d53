"""Map-reduce over a book: note what each chapter says, then answer from the notes.

Chapters are read side by side, and each is computed once, however many questions there are:
the branches that ask share it in the server's prefix cache.

    python -m sps_runtime.launch_server --sp-size 2      # or `make serve`, in another terminal
    python examples/map_reduce.py [URL [CHAT_TEMPLATE]]
"""

import sys
from pathlib import Path

import sps_runtime.lang as sgl  # or: import sglang as sgl

BOOK = Path(__file__).parents[1] / "python/sps_runtime/assets/document.txt"
QUESTIONS = [
    "What are the invoices of Vera Zimmer?",
    "What are the vouchers of Maria Dalton?",
    "Please list the permits of Bruno Weaver.",
]
PARAGRAPHS_PER_CHAPTER = 32


@sgl.function
def read_chapter(s, chapter, questions):
    """Map: one note for each question, by branches that share the chapter."""
    s += sgl.user_begin() + chapter
    notes = s.fork(len(questions))
    for note, question in zip(notes, questions, strict=True):
        note += "\n\n" + question + sgl.user_end()
        note += sgl.assistant(sgl.gen("note", max_tokens=96))
    notes.join()
    s["cached_tokens"] = [note.get_meta_info("note")["cached_tokens"] for note in notes]


@sgl.function
def conclude(s, notes, question):
    """Reduce: answer from the notes alone."""
    s += sgl.user("\n\n".join(notes) + "\n\n" + question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=96))


def chapters_of(book):
    paragraphs = book.split("\n\n")
    starts = range(0, len(paragraphs), PARAGRAPHS_PER_CHAPTER)
    return ["\n\n".join(paragraphs[i : i + PARAGRAPHS_PER_CHAPTER]) for i in starts]


def main(url="http://127.0.0.1:30000", chat_template="chatml"):
    sgl.set_default_backend(sgl.RuntimeEndpoint(url, chat_template_name=chat_template))
    chapters = chapters_of(BOOK.read_text())
    arguments = [{"chapter": chapter, "questions": QUESTIONS} for chapter in chapters]
    read = read_chapter.run_batch(arguments, temperature=0)
    notes = zip(*(state["note"] for state in read), strict=True)
    arguments = [{"notes": n, "question": q} for n, q in zip(notes, QUESTIONS, strict=True)]
    concluded = conclude.run_batch(arguments, temperature=0)
    for question, state in zip(QUESTIONS, concluded, strict=True):
        print(f"{question}\n  {state['answer']}")
    cached = [state["cached_tokens"] for state in read]
    print(f"{len(chapters)} chapters; tokens that branches found computed: {cached}")
    return {"notes": [state["note"] for state in read], "cached_tokens": cached}


if __name__ == "__main__":
    main(*sys.argv[1:])
