"""langchain-openai against a server: ``python check_langchain.py URL``."""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
from typing import Literal

from checks import run_all
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    mood: Literal["glad", "sad"]


@tool
def weather(town: Literal["Rome", "Oslo"]) -> str:
    """Tell the weather of a town."""
    return f"sunny in {town}"


TALK = [SystemMessage("Be brief."), HumanMessage("How is the weather in Rome?")]


def model(url: str, **options: object) -> ChatOpenAI:
    told = {"max_tokens": 100, "temperature": 0, **options}
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="default", max_retries=0, **told)


def check_invoke(url: str) -> None:
    answer = model(url, max_tokens=16).invoke(TALK)
    assert isinstance(answer, AIMessage) and answer.usage_metadata["output_tokens"] <= 16


def check_stream(url: str) -> None:
    chat = model(url, max_tokens=24)
    pieces = [piece.content for piece in chat.stream(TALK)]
    assert "".join(pieces) == chat.invoke(TALK).content and len(pieces) > 1


def check_batch_and_asynchronous(url: str) -> None:
    chat = model(url, max_tokens=8)
    assert len(chat.batch([TALK] * 4)) == 4
    assert asyncio.run(chat.ainvoke(TALK)).content == chat.invoke(TALK).content


def check_structured_output(url: str) -> str:
    methods = ("json_schema", "function_calling")
    for method in methods:
        asked = model(url).with_structured_output(Person, method=method)
        assert isinstance(asked.invoke("Ada is glad."), Person), method
    return ", ".join(methods)


def check_tools(url: str) -> None:
    bound = model(url).bind_tools([weather], tool_choice="weather")
    answer = bound.invoke(TALK)
    (call,) = answer.tool_calls
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage) and result.content.startswith("sunny in ")
    assert isinstance(model(url).bind_tools([weather]).invoke([*TALK, answer, result]), AIMessage)


def check_chain(url: str) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")])
    chain = prompt | model(url, max_tokens=8)
    assert isinstance(chain.invoke({"question": "Who?"}).content, str)


def check_responses(url: str) -> None:
    answer = model(url, max_tokens=16, use_responses_api=True).invoke(TALK)
    assert answer.text and answer.usage_metadata["output_tokens"] > 0


def check_plain_completion(url: str) -> None:
    plain = OpenAI(base_url=f"{url}/v1", api_key="none", model="default", max_tokens=8)
    assert isinstance(plain.invoke("Once upon a time"), str)


if __name__ == "__main__":
    print("langchain-openai", importlib.metadata.version("langchain-openai"))
    run_all(globals(), sys.argv[1])
