"""An agent with tools, by OpenAI's client: the model calls functions until it can answer.

Arguments of calls fit the functions' schemas: where a call is required, the server constrains
what is generated.

    pip install openai
    python -m sps_runtime.launch_server --sp-size 2      # or `make serve`, in another terminal
    python examples/agent.py [URL]
"""

import json
import re
import sys
from pathlib import Path

import openai

DOCUMENT = Path(__file__).parents[1] / "python/sps_runtime/assets/document.txt"
PEOPLE = ["James Morgan", "Lucas Norris", "Diana Ramos", "Bella Moore"]
QUESTION = "What is the room of the partner of James Morgan?"
ROUNDS = 4


def search(name):
    """All sentences of the register that mention a person."""
    sentences = re.findall(r"[^.\n]*\.", DOCUMENT.read_text())
    found = [sentence.strip() for sentence in sentences if name in sentence]
    return " ".join(found) or f"The register does not mention {name}."


FUNCTIONS = {"search": search}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": search.__doc__,
            "parameters": {
                "type": "object",
                "properties": {"name": {"enum": PEOPLE}},
                "required": ["name"],
                "additionalProperties": False,
            },
        },
    }
]


def call(tool_call):
    """Run one call; the message that tells the model what came of it."""
    function = FUNCTIONS[tool_call.function.name]
    result = function(**json.loads(tool_call.function.arguments))
    print(f"  {tool_call.function.name}({tool_call.function.arguments}) -> {result}")
    return {"role": "tool", "tool_call_id": tool_call.id, "content": result}


def solve(client, question):
    """Ask; call what the model wants called; ask again, until it answers in words."""
    options = {"tools": TOOLS, "parallel_tool_calls": False, "temperature": 0, "max_tokens": 128}
    messages = [{"role": "user", "content": question}]
    for turn in range(ROUNDS):
        choice = "required" if turn == 0 else "auto" if turn < ROUNDS - 1 else "none"
        answer = client.chat.completions.create(
            model="default", messages=messages, tool_choice=choice, **options
        )
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        messages += [call(tool_call) for tool_call in message.tool_calls]
    return messages


def main(url="http://127.0.0.1:30000"):
    print(QUESTION)
    messages = solve(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), QUESTION)
    print(messages[-1]["content"])
    return messages


if __name__ == "__main__":
    main(*sys.argv[1:])
