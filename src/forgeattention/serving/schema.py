"""Bodies of the endpoint's requests, after OpenAI's API reference; a few fields are vLLM's. What is not honoured is
refused by name: see `fields`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .fields import refusal

MOST_STOPS = 16
Tokens = Annotated[int, Field(ge=1, le=10_000_000)]


class Base(BaseModel):
    """Where null stands for the default, and no field is ignored."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in values.items():
            if name not in known and (why := refusal(name, value)):
                raise ValueError(why)
        return {name: value for name, value in values.items() if value is not None}


def _stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a text or a list of texts")
    if len(texts) > MOST_STOPS:
        raise ValueError(f"expected at most {MOST_STOPS} texts; got {len(texts)}")
    if not all(0 < len(text) <= 1000 for text in texts):
        raise ValueError("expected texts of 1 to 1000 characters")
    return texts


def _bias(value: Any) -> Any:
    try:
        found = {int(token): float(bias) for token, bias in value.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError("expected numbers by token") from None
    if len(found) > 1024 or any(token < 0 or not -100 <= bias <= 100 for token, bias in found.items()):
        raise ValueError("expected at most 1024 tokens of 0 or more, with numbers from -100 to 100")
    return found


def _prompt(value: Any) -> list[str] | list[list[int]]:
    """Prompts as a list, from each of the four forms."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise ValueError("expected a text, a list of tokens, or a list of these")
    if all(isinstance(text, str) for text in texts):
        return texts
    rows = texts if all(isinstance(row, list) and row for row in texts) else [texts]
    for row in rows:
        for token in row:
            if not isinstance(token, int) or isinstance(token, bool):
                raise ValueError(f"expected texts alone, or tokens alone; got {_short(token)}")
            if token < 0:
                raise ValueError(f"expected tokens of 0 or more; got {token}")
    return rows


def _content(value: Any) -> Any:
    """A message's text; parts are joined."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"expected a text or a list of parts; got {_short(value)}")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"expected parts of type text; part {i} is {_short(kind if kind != 'text' else part)}")
        texts.append(part["text"])
    return "".join(texts)


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Function(Base):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class Tool(Base):
    type: Literal["function"]
    function: Function


class Called(Base):
    name: str
    arguments: str | dict[str, Any] = "{}"


class Call(Base):
    type: Literal["function"] = "function"
    id: str | None = None
    index: int | None = None
    function: Called


class Message(Base):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_content, json_schema_input_type=str | list[Part] | None)] = None
    name: str | None = None
    tool_calls: list[Call] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content: expected a text; only an assistant's message with tool_calls may have none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: expected in an assistant's message; got one of {self.role}")
        return self


class StreamOptions(Base):
    include_usage: bool = False


class JsonSchema(Base):
    name: str | None = None
    description: str | None = None
    strict: bool = True
    json_schema: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(Base):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: expected with type json_schema, and only then")
        return self

    @property
    def schema_of_text(self) -> Any:
        """The JSON schema that the text must follow; None for plain text."""
        if self.json_schema is not None:
            return self.json_schema.json_schema
        return {"type": "object"} if self.type == "json_object" else None


class Generation(Base):
    """What chat and plain completions share."""

    model: str | None = None
    max_tokens: Tokens | None = None
    min_tokens: int = Field(0, ge=0, le=10_000_000)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1, description="0 and -1 take all tokens")
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, gt=0, le=10, allow_inf_nan=False)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias, json_schema_input_type=dict[str, float])] = {}
    n: int = Field(1, ge=1, le=128)
    stop: Annotated[list[str], BeforeValidator(_stop, json_schema_input_type=str | list[str])] = []
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    ignore_eos: bool = False
    seed: int = Field(-1, ge=-(2**63), lt=2**63 - 128, description="-1 draws another one each time")
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat = ResponseFormat()

    @model_validator(mode="after")
    def _streamed(self) -> Generation:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options: expected with stream true, and only then")
        return self


class Chat(Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Tokens | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    best_of: Literal[1] = 1
    echo: Literal[False] = False

    @model_validator(mode="after")
    def _matching(self) -> Chat:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: expected with logprobs true")
        if isinstance(self.tool_choice, dict):
            if self.named is None:
                raise ValueError('tool_choice: expected {"type": "function", "function": {"name": NAME}} of a tool')
        elif self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice: expected tools with it")
        return self

    @property
    def named(self) -> Function | None:
        """The function that `tool_choice` names."""
        choice = self.tool_choice if isinstance(self.tool_choice, dict) else {}
        inner = choice.get("function") if choice.get("type") == "function" else None
        name = inner.get("name") if isinstance(inner, dict) else None
        return next((tool.function for tool in self.tools if tool.function.name == name), None)

    @property
    def functions(self) -> list[Function]:
        """The functions that the answer may call."""
        if self.tool_choice == "none":
            return []
        return [self.named] if self.named is not None else [tool.function for tool in self.tools]


class Completion(Generation):
    prompt: Annotated[
        list[str] | list[list[int]],
        BeforeValidator(_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    logprobs: Annotated[
        int | None, Field(ge=0, le=20), BeforeValidator(lambda value: None if value is False else value)
    ] = None
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _best(self) -> Completion:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: not supported; only the number n passes")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: expected 1 or more; 0 goes with echo")
        return self
