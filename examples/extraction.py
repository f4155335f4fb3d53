"""Structured extraction: records of a long document that are JSON of a given schema, always.

Each value is quoted in a sentence, which the model finds easier and the program can check. The
document stands in the program itself, so that run_batch finds the text that all runs begin with
and has it computed before the first of them; each run adds only whom it asks about.

    python -m sps_runtime.launch_server --sp-size 2      # or `make serve`, in another terminal
    python examples/extraction.py [URL [CHAT_TEMPLATE]]
"""

import json
import sys
from pathlib import Path

import sps_runtime.lang as sgl  # or: import sglang as sgl

DOCUMENT = (Path(__file__).parents[1] / "python/sps_runtime/assets/document.txt").read_text()
NAMES = ["Jack Taylor", "Nora Lambert", "Michael Archer"]


def schema_of(name):
    """Of a record that quotes the badge of `name`."""
    quote = {"type": "string", "pattern": f"^The badge of {name} is [0-9]{{4}}$"}
    record = {"type": "object", "properties": {"badge": quote}, "required": ["badge"]}
    return json.dumps({**record, "additionalProperties": False})


@sgl.function
def extract(s, name):
    s += sgl.user_begin() + DOCUMENT + "\n\nWhat is the badge of "
    s += name + "?" + sgl.user_end() + sgl.assistant_begin()
    s += sgl.gen("record", max_tokens=64, json_schema=schema_of(str(name)))
    s += sgl.assistant_end()


def badge_in(record):
    """The value itself, and whether some sentence has it together with the name."""
    quote = json.loads(record)["badge"]
    name, badge = quote.removeprefix("The badge of ").split(" is ")
    supported = any(name in line and badge in line for line in DOCUMENT.split("."))
    return {"badge": badge, "supported": supported}


def main(url="http://127.0.0.1:30000", chat_template="chatml"):
    sgl.set_default_backend(sgl.RuntimeEndpoint(url, chat_template_name=chat_template))
    states = extract.run_batch([{"name": name} for name in NAMES], temperature=0)
    records = {name: badge_in(s["record"]) for name, s in zip(NAMES, states, strict=True)}
    for name, record in records.items():
        print(f"{name}: {record}")
    cached = [state.get_meta_info("record")["cached_tokens"] for state in states]
    print(f"tokens found computed: {cached}")
    return {"records": records, "cached_tokens": cached}


if __name__ == "__main__":
    main(*sys.argv[1:])
