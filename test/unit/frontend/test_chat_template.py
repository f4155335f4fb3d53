from __future__ import annotations

from pathlib import Path

import pytest
from test.kit import tokenizers as kinds

from sps_runtime.frontend.chat_template import ChatTemplate
from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.types.errors import ConfigError, InvalidRequest

HELLO = [{"role": "user", "content": "Hello"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, bos_token="<s>").render(HELLO, variables, max_chars=1000)


def test_chatml(byte_level: Tokenizer) -> None:
    assert byte_level.chat_template is not None
    text = byte_level.chat_template.render(HELLO, max_chars=1000)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = byte_level.encode(text, add_special_tokens=False)
    assert byte_level.decode(ids, skip_special_tokens=False) == text


def test_helpers_of_hugging_face() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n"
        "  {%- if loop.index > 5 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y')[:2] }}"
    )
    assert render(source) == '<s>{"role": "user", "content": "Hello"}20'


def test_training_marks_are_plain_text() -> None:
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}"
    )
    assert render(source) == "Hello!"


def test_a_template_may_refuse() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ().__class__.__mro__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ nothing.at.all }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


def test_output_is_bounded_while_it_is_made() -> None:
    with pytest.raises(InvalidRequest) as caught:
        render("{% for i in range(9999) %}{% for j in range(9999) %}abc{% endfor %}{% endfor %}")
    assert caught.value.code == "context_length_exceeded"


def test_broken_template_ends_the_start() -> None:
    with pytest.raises(ConfigError):
        ChatTemplate("{% for %}")


def test_where_templates_are_found(tmp_path: Path) -> None:
    fast = kinds.byte_level_tokenizer()
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    kinds.write_directory(tmp_path, fast, template=None, chat_template=named)
    assert _says(Tokenizer(tmp_path)) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert _says(Tokenizer(tmp_path)) == "J"
    (tmp_path / "own.jinja").write_text("O")
    assert _says(Tokenizer(tmp_path, tmp_path / "own.jinja")) == "O"


def _says(tokenizer: Tokenizer) -> str:
    assert tokenizer.chat_template is not None
    return tokenizer.chat_template.render(HELLO, max_chars=10)


def test_missing_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_bos_is_put_in_front_once(sentencepiece: Tokenizer) -> None:
    assert sentencepiece.encode("fox")[:1] == [1]
    assert sentencepiece.encode("<s>fox").count(1) == 1
    assert 1 not in sentencepiece.encode("fox", add_special_tokens=False)
