"""JSON of a schema and calls of tools: what the model may say, and how its answer is read."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai
import pytest
import tiny
from serving_engine import Running, chunks, engine, model, post, says, stream

from forgeattention.serving.api import create_app
from forgeattention.serving.grammar import Grammars
from forgeattention.serving.tool_calls import BARE, TAGGED, CallReader, grammar, style_of

needs_llguidance = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("llguidance") is None, reason="llguidance is not installed"
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FUNCTION = {"name": "add", "description": "Adds.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "now"}}]
QWEN = """{% if tools %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant:{% if think %}?{% endif %}{% endif %}"""
"""In the form of Qwen2.5's chat template."""
LLAMA = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and value}. {{ tools }}'
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call>'
ASK = {"messages": [{"role": "user", "content": "what is it"}], "max_tokens": 200, "temperature": 0}


def words() -> Any:
    made = tiny.tokenizer()
    made.chat_template = QWEN
    return made


@pytest.fixture(scope="module")
def made() -> Any:
    built = engine(model(), words(), max_pages=200)
    yield built
    built.drain(5)


@pytest.fixture(scope="module")
def running(made) -> Any:
    server = Running(create_app(made, "tiny"))
    yield server
    server.stop()


def read(reader: CallReader, text: str, step: int) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls of an answer that comes in pieces of `step` characters."""
    said, calls = "", []
    parts = [text[at : at + step] for at in range(0, len(text), step)] or [""]
    for i, part in enumerate(parts):
        plain, found = reader.push(part, last=i == len(parts) - 1)
        said += plain
        calls += [(call["function"]["name"], call["function"]["arguments"]) for call in found]
    return said, calls


ADD = ("add", '{"a": 3}')


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("", "", []),
        ("plain <b> text ", "plain <b> text ", []),
        (CALL, "", [ADD]),
        ("\n" + CALL + "\n", "", [ADD]),
        ("Let me see.\n\n" + CALL, "Let me see.", [ADD]),
        (CALL + "\n" + CALL, "", [ADD, ADD]),
        (CALL.removesuffix("\n</tool_call>"), "", [ADD]),
        ("a <tool_call>no json</tool_call> b", "a <tool_call>no json</tool_call> b", []),
        ("a <tool_call>{", "a <tool_call>{", []),
        ("ends in <tool_", "ends in <tool_", []),
        ('<tool_call>{"name": "now", "arguments": {}}</tool_call>', "", [("now", "{}")]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
        ('<tool_call>{"name": "é", "arguments": {"x": "ü </b>"}}</tool_call>', "", [("é", '{"x": "ü </b>"}')]),
    ],
)
def test_tagged_calls_are_read(text, said, calls, step):
    got, found = read(CallReader(TAGGED), text, step)
    assert found == calls
    assert got.strip() == said.strip()
    assert calls or got == text


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("plain; text {", "plain; text {", []),
        ('{"name": "add", "parameters": {"a": 3}}', "", [ADD]),
        (' {"name": "add", "parameters": {"a": 3}}; {"name": "now", "parameters": {}}', "", [ADD, ("now", "{}")]),
        ('{"name": "add", "parameters": {"a": "1; 2"}}', "", [("add", '{"a": "1; 2"}')]),
        ('{"x": 1}', '{"x": 1}', []),
        ("{ a set }", "{ a set }", []),
    ],
)
def test_bare_calls_are_read(text, said, calls, step):
    assert read(CallReader(BARE), text, step) == (said, calls)


def test_one_call_where_one_was_asked_for():
    assert read(CallReader(TAGGED, many=False), CALL + "\n" + CALL, 5) == ("", [ADD])


def test_styles_by_template():
    assert style_of(QWEN, set()) is TAGGED
    assert style_of(LLAMA, set()) is BARE
    assert style_of(QWEN, {"<tool_call>"}) is None, "answers would leave it out"
    assert style_of("{{ messages }}", set()) is None
    assert style_of("{{ tools }} <tool_call><function=name> arguments", set()) is None
    assert style_of("{{ tools }} [TOOL_CALLS]", set()) is None


def follows(made: Any, tokenizer: Any, text: str) -> bool:
    """Whether a grammar allows a text and an end after it."""
    for token in tokenizer(text).input_ids:
        if made.ended or not made.allowed()[token]:
            return False
        made.take(token)
    return made.ended or bool(made.allowed()[256])


@needs_llguidance
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("style", [TAGGED, BARE])
def test_grammars_of_calls(style, added):
    tokenizer = tiny.tokenizer()
    if added:  # as in Qwen's vocabularies
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    grammars = Grammars(tokenizer, len(tokenizer), {256})
    head, tail = (f"{style.begin}\n", f"\n{style.end}") if style.begin else ("", "")

    def call(name: str, arguments: str) -> str:
        return f'{head}{{"name": "{name}", "{style.arguments}": {arguments}}}{tail}'

    good, other = call("add", '{"a": 1}'), call("now", '{"z": [1]}')
    functions = [FUNCTION, {"name": "now", "parameters": None}]
    for forced in (True, False):
        for many in (True, False):
            lark = grammar(style, functions, many, forced, grammars.literal)

            def ok(text: str, lark: str = lark) -> bool:
                return follows(grammars.lark(lark), tokenizer, text)

            assert ok(good)
            assert ok(other)
            assert not ok(call("add", "{}"))
            assert not ok(call("add", '{"a": "1"}'))
            assert not ok(call("none", "{}"))
            assert ok("some words") == (not forced)
            if forced or added or style is BARE:  # elsewhere more calls are text, and the reader leaves them out
                assert ok(good + "\n" + other) == (many and style is TAGGED)


@needs_llguidance
@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize(
    ("form", "check"),
    [
        ({"type": "json_object"}, lambda found: isinstance(found, dict)),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
            lambda found: isinstance(found["a"], int) and len(found) == 1,
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "green"]}}},
            lambda found: found in ("red", "green"),
        ),
    ],
)
def test_answers_are_json_of_the_schema(running, form, check, temperature):
    """A model of random weights says nothing but noise; constrained, it says JSON, or is cut in the middle of it."""
    whole = 0
    for path, ask in (("/v1/chat/completions", ASK), ("/v1/completions", {"prompt": "what", "max_tokens": 200})):
        for seed in range(3):
            body = ask | {"response_format": form, "temperature": temperature, "seed": seed}
            status, _, answer = post(running.port, path, body)
            assert status == 200, answer
            choice = answer["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            if choice["finish_reason"] == "stop":
                whole += 1
                assert check(json.loads(text)), text
            else:
                assert text.startswith(("{", '"'))
    assert whole or "enum" not in str(form)


@needs_llguidance
def test_schemas_that_cannot_be_followed_are_refused(running):
    for schema, text in (({"type": "foo"}, "Invalid type"), ({"$ref": "http://a.example/b"}, "response_format: ")):
        body = ASK | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        status, _, answer = post(running.port, "/v1/chat/completions", body)
        assert status == 400
        assert text in answer["error"]["message"]
        assert answer["error"]["param"] == "response_format"


def test_without_llguidance_the_command_is_said(running, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, answer = post(running.port, "/v1/chat/completions", ASK | {"response_format": {"type": "json_object"}})
    assert status == 400
    assert answer["error"]["message"] == (
        "response_format: needs llguidance on the server: pip install 'forgeattention[structured]'"
    )


@needs_llguidance
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_forced_calls(running, choice):
    for seed in range(3):
        body = ASK | {"tools": TOOLS, "tool_choice": choice, "temperature": 1.5, "seed": seed, "max_tokens": 400}
        status, _, answer = post(running.port, "/v1/chat/completions", body | {"parallel_tool_calls": False})
        assert status == 200, answer
        said = answer["choices"][0]
        if said["finish_reason"] == "length":
            continue
        assert said["finish_reason"] == "tool_calls"
        (call,) = said["message"]["tool_calls"]
        assert call["function"]["name"] in ("add", "now")
        arguments = json.loads(call["function"]["arguments"])
        assert call["function"]["name"] == "now" or list(arguments) == ["a"]
        assert said["message"]["content"] is None
        if choice != "required":
            assert call["function"]["name"] == "add"


def test_free_calls_whole_and_streamed(made, running, monkeypatch):
    monkeypatch.setattr(made, "_logits", made._logits)
    script = f"I look.\n{CALL}\n{CALL}"
    says(made, [*words()(script).input_ids, 256])
    with openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0) as client:
        ask = ASK | {"model": "tiny", "tools": TOOLS, "max_tokens": 300}
        message = client.chat.completions.create(**ask).choices[0].message
        assert message.content == "I look."
        assert [(c.type, c.function.name, c.function.arguments) for c in message.tool_calls] == [("function", *ADD)] * 2
        assert len({call.id for call in message.tool_calls}) == 2
        with client.chat.completions.stream(**ask) as events:
            streamed = events.get_final_completion().choices[0].message
        assert streamed.content == "I look."
        assert [(c.function.name, c.function.arguments) for c in streamed.tool_calls] == [ADD] * 2
        none = client.chat.completions.create(**ask, tool_choice="none").choices[0].message
        assert none.content == script
        assert none.tool_calls is None
        stopped = client.chat.completions.create(**(ask | {"stop": "</tool_call>"})).choices[0]
        assert stopped.finish_reason == "tool_calls"
        assert len(stopped.message.tool_calls) == 1
    deltas = [
        c["choices"][0]["delta"]
        for c in chunks(stream(running.port, "/v1/chat/completions", ASK | {"tools": TOOLS, "max_tokens": 300}))
    ]
    assert [call["index"] for delta in deltas for call in delta.get("tool_calls", [])] == [0, 1]
    assert "<tool_call>" not in "".join(delta.get("content", "") for delta in deltas)


def test_calls_and_results_go_back_to_the_template(made, running):
    prompts: list[Any] = []
    real = made.tokenizer.apply_chat_template

    def seen(messages: Any, **options: Any) -> Any:
        prompts.append(real(messages, **options))
        return prompts[-1]

    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
    ]
    made.tokenizer.apply_chat_template = seen
    try:
        body = ASK | {"messages": messages, "tools": TOOLS, "max_tokens": 2, "chat_template_kwargs": {"think": True}}
        status, _, answer = post(running.port, "/v1/chat/completions", body)
        assert status == 200, answer
    finally:
        del made.tokenizer.apply_chat_template
    assert '"name": "add", "description": "Adds."' in prompts[0]
    assert "strict" not in prompts[0]
    assert prompts[0].endswith(f"user:what is itassistant:{CALL}tool:7assistant:?")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice: expected"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0."),
        ({"response_format": {"type": "json_object"}}, "response_format: not supported together with tools"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs: the model's template reads no 'tools'"),
        ({"chat_template_kwargs": {"other": 1}}, "chat_template_kwargs: the model's template reads no 'other'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages.0.tool_calls.0: expected arguments of JSON",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages.0.tool_calls: expected in an assistant's message; got one of user",
        ),
    ],
)
def test_tools_that_cannot_be_served_are_refused(running, more, text):
    status, _, answer = post(running.port, "/v1/chat/completions", ASK | {"tools": TOOLS} | more)
    assert status == 400
    assert text in answer["error"]["message"]
