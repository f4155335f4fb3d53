"""instructor over the openai package against a server: ``python check_instructor.py URL``."""

from __future__ import annotations

import sys
from typing import Any, Literal

import instructor
import openai
from checks import run_all
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=12)
    mood: Literal["glad", "sad"]
    age: int = Field(ge=0, le=99)


class Family(BaseModel):
    people: list[Person] = Field(max_length=2)


ASK: dict[str, Any] = {
    "model": "default",
    "messages": [{"role": "user", "content": "Ada is glad and 36 years old."}],
    "max_tokens": 300,
    "max_retries": 0,
}
MODES = ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA")


def patched(url: str, mode: str) -> instructor.Instructor:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return instructor.from_openai(client, mode=instructor.Mode[mode])


def check_modes(url: str) -> str:
    for mode in MODES:
        answer = patched(url, mode).chat.completions.create(
            response_model=Person, temperature=0, **ASK
        )
        assert isinstance(answer, Person), (mode, answer)
    return ", ".join(MODES)


def check_nested(url: str) -> None:
    client = patched(url, "JSON_SCHEMA")
    answer = client.chat.completions.create(response_model=Family, temperature=0, **ASK)
    assert isinstance(answer, Family) and len(answer.people) <= 2


def check_partial_stream(url: str) -> None:
    client = patched(url, "JSON_SCHEMA")
    partials = list(
        client.chat.completions.create_partial(response_model=Person, temperature=0, **ASK)
    )
    assert len(partials) > 1
    assert Person.model_validate(partials[-1].model_dump())


def check_completion_beside_it(url: str) -> None:
    client = patched(url, "TOOLS")
    person, raw = client.chat.completions.create_with_completion(response_model=Person, **ASK)
    assert isinstance(person, Person) and raw.usage.completion_tokens > 0


if __name__ == "__main__":
    print("instructor", instructor.__version__)
    run_all(globals(), sys.argv[1])
