"""From a chat's messages and tools to what the model's template reads."""

from __future__ import annotations

import json
import re
from typing import Any

from .grammar import Grammar, Grammars
from .schema import Chat, Message
from .tool_calls import CallReader, grammar, style_of

ROLES = {"developer": "system"}
OWN = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "chat_template"}
"""Variables of templates that a request's `chat_template_kwargs` may not set."""


class ChatFormat:
    """How a model's chat is written, by its template.

    Args:
        template: the template's source, "" for none.
        special: texts of the tokenizer's special tokens.
    """

    def __init__(self, template: str, special: set[str]) -> None:
        self._template = template
        self._style = style_of(template, special)

    def check(self, body: Chat) -> None:
        """Refuses what the template cannot say.

        Raises:
            ValueError: no template, tools that it does not write, or variables that it does not read.
        """
        if not self._template:
            raise ValueError("messages: expected a model with a chat template; use /v1/completions")
        for name in body.chat_template_kwargs:
            if name in OWN or not re.search(rf"\b{re.escape(name)}\b", self._template):
                raise ValueError(f"chat_template_kwargs: the model's template reads no {name[:100]!r}")
        if body.functions and self._style is None:
            raise ValueError("tools: the model's chat template shows no way to call them that this server knows")
        if body.functions and body.response_format.type != "text":
            raise ValueError("response_format: not supported together with tools")

    def messages(self, body: Chat) -> list[dict[str, Any]]:
        """The messages as templates read them.

        Raises:
            ValueError: a call whose arguments are not JSON.
        """
        return [self._message(i, message) for i, message in enumerate(body.messages)]

    def _message(self, i: int, message: Message) -> dict[str, Any]:
        made: dict[str, Any] = {"role": ROLES.get(message.role, message.role), "content": message.content or ""}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                made[name] = value
        calls = []
        for j, call in enumerate(message.tool_calls):
            try:
                said = call.function.arguments
                arguments = json.loads(said or "{}") if isinstance(said, str) else said
            except ValueError:
                raise ValueError(f"messages.{i}.tool_calls.{j}: expected arguments of JSON") from None
            function = {"name": call.function.name, "arguments": arguments}
            calls.append({"type": "function", "id": call.id, "function": function})
        return made | ({"tool_calls": calls} if calls else {})

    def tools(self, body: Chat) -> list[dict[str, Any]] | None:
        """The tools as templates read them; None for none."""
        if not body.functions:
            return None
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools]

    def reader(self, body: Chat) -> CallReader | None:
        """What reads calls in an answer; None where there can be none."""
        return CallReader(self._style, body.parallel_tool_calls) if body.functions and self._style else None

    def grammar(self, body: Chat, grammars: Grammars) -> Grammar | None:
        """The grammar of answers where calls are forced or must follow their schemas; None where they are free.

        Raises:
            ValueError: schemas that llguidance cannot follow, or no llguidance.
        """
        functions = body.functions
        forced = body.tool_choice == "required" or body.named is not None
        if self._style is None or not functions or not (forced or any(function.strict for function in functions)):
            return None
        many = body.parallel_tool_calls and body.named is None
        tools = [function.model_dump() for function in functions]
        return grammars.lark(grammar(self._style, tools, many, forced, grammars.literal))
