"""Tree search with fork: several ways to go on at each step, and only the best are followed.

A branch goes on from everything its ancestors wrote, and the server has all of that in its
prefix cache: searching a tree of answers about a long document reads the document once.

    python -m sps_runtime.launch_server --sp-size 2      # or `make serve`, in another terminal
    python examples/tree_search.py [URL [CHAT_TEMPLATE]]
"""

import sys
from pathlib import Path
from statistics import fmean

import sps_runtime.lang as sgl  # or: import sglang as sgl

DOCUMENT = Path(__file__).parents[1] / "python/sps_runtime/assets/document.txt"
QUESTION = "What is the room of the partner of James Morgan?"
WIDTH, KEPT, DEPTH, STEP_TOKENS = 3, 2, 4, 8


def tree_search(root):
    """The leaves that remain, best first, as (mean logprob of a token, branch)."""
    level = [(0.0, root)]
    for _ in range(DEPTH):
        branches = [branch for _, node in level for branch in node.fork(WIDTH)]
        for branch in branches:
            branch += sgl.gen("step", max_tokens=STEP_TOKENS, return_logprob=True)
        distinct = {branch.text(): (score(branch), branch) for branch in branches}
        level = sorted(distinct.values(), key=lambda pair: pair[0], reverse=True)[:KEPT]
    return level


def score(branch):
    """Mean logprob of all that was generated on the way from the root."""
    step = branch.get_meta_info("step")
    logprobs = [token[0] for token in step["output_token_logprobs"]]
    branch["way"] = [*branch["way"], *logprobs]
    branch["reused"] = step["cached_tokens"]
    return fmean(branch["way"])


@sgl.function
def search(s, document, question):
    s += sgl.user(document + "\n\n" + question) + sgl.assistant_begin()
    s["asked"], s["way"] = len(s.text()), []
    leaves = tree_search(s)
    s["answers"] = [(value, leaf.text()[s["asked"] :].strip()) for value, leaf in leaves]
    s["reused"] = [leaf["reused"] for _, leaf in leaves]


def main(url="http://127.0.0.1:30000", chat_template="chatml"):
    sgl.set_default_backend(sgl.RuntimeEndpoint(url, chat_template_name=chat_template))
    state = search.run(DOCUMENT.read_text(), QUESTION, temperature=1.2)
    print(QUESTION)
    for value, answer in state["answers"]:
        print(f"  {value:7.3f}  {answer}")
    print(f"tokens that the last step found computed: {state['reused']}")
    return {"answers": state["answers"], "cached_tokens": state["reused"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
