"""Calls of tools: how a model writes them, by its chat template, and how they are read back."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .grammar import as_json


@dataclass(frozen=True)
class Style:
    """How a model writes a call: JSON of a name and arguments, between two texts.

    Attributes:
        begin, end: the texts before and after the JSON, "" where it stands alone.
        arguments: the key of the arguments.
    """

    begin: str
    end: str
    arguments: Literal["arguments", "parameters"]


TAGGED = Style("<tool_call>", "</tool_call>", "arguments")
"""Hermes, Qwen2.5, Qwen3, SmolLM3: JSON inside `<tool_call>`, as many as there are calls."""
BARE = Style("", "", "parameters")
"""Llama 3.1 to 3.3: an answer that is a call is JSON and nothing else."""


def style_of(template: str, special: set[str]) -> Style | None:
    """The style that a chat template shows; None where it has no place for tools or shows another.

    Args:
        template: its source.
        special: texts of the tokenizer's special tokens, which answers leave out.
    """
    if not re.search(r"\btools\b", template):
        return None
    others = ("<function=", "<arg_key>", "<tool_calls>", "[TOOL_CALLS]")
    if "<tool_call>" in template and "arguments" in template and not any(other in template for other in others):
        return TAGGED if "<tool_call>" not in special else None
    if '{"name": function name, "parameters": ' in template:
        return BARE
    return None


def grammar(
    style: Style, tools: Sequence[dict[str, Any]], many: bool, forced: bool, literal: Callable[[str], str]
) -> str:
    """Lark of answers that hold calls of these functions, their arguments by their schemas.

    Args:
        tools: the functions, in OpenAI's form.
        many: whether there may be more than one call.
        forced: whether the answer must be a call; else text may come before calls, and no call need come.
        literal: gives the Lark of a text that may be a token of its own.
    """
    choices = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                style.arguments: tool.get("parameters") or {"type": "object"},
            },
            "required": ["name", style.arguments],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    rules = {"json": f"%json {as_json({'anyOf': choices} if len(choices) > 1 else choices[0])}"}
    if not style.begin:
        rules["start"] = "json" if forced else "json | OTHER"
        rules["OTHER"] = r"/[^{\s](.|\n)*/"
    else:
        begin, end = literal(style.begin), literal(style.end)
        rules["call"] = rf'{begin} "\n" json "\n" {end}'
        if forced:
            rules["start"] = r'call ("\n" call)*' if many else "call"
        else:
            rules["start"] = f"said{'*' if many else '?'} TEXT"
            rules["TEXT"] = r"/(.|\n)*/"
            if begin.startswith("<"):
                rules["said"] = "TEXT call"
            else:  # the text ends where the first call begins
                rules["before[lazy]"] = f"TEXT {begin}"
                rules["said"] = rf'before "\n" json "\n" {end}'
    return "%llguidance {}\n" + "".join(f"{name}: {rule}\n" for name, rule in rules.items())


class CallReader:
    """Text and calls of an answer as it comes.

    Args:
        style: how calls are written.
        many: whether calls after the first count; else they are left out.
    """

    def __init__(self, style: Style, many: bool = True) -> None:
        self._style = style
        self._many = many
        self._held = ""
        self._said = False
        self.calls = 0

    def push(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """What is certain after more text: plain text, and whole calls in OpenAI's form.

        Args:
            text: the new text.
            last: whether it is the answer's end.
        """
        self._held += text
        plain, calls = self._bare(last) if not self._style.begin else self._tagged(last)
        if not self._said:  # blanks before the first word, and between calls, are no content
            plain = plain.lstrip() if self.calls or calls else plain
        self._said = self._said or bool(plain.strip())
        calls = calls if self._many else calls[: 1 - min(self.calls, 1)]
        for call in calls:
            call["index"] = self.calls
            self.calls += 1
        return plain, calls

    def _tagged(self, last: bool) -> tuple[str, list[dict[str, Any]]]:
        begin, end = self._style.begin, self._style.end
        plain = ""
        calls: list[dict[str, Any]] = []
        while True:
            at = self._held.find(begin)
            if at < 0:
                keep = 0 if last else _tail(self._held, begin)
                cut = len(self._held) - keep
                plain, self._held = plain + self._held[:cut], self._held[cut:]
                return plain.rstrip() if last and (calls or self.calls) else plain, calls
            stop = self._held.find(end, at)
            if stop < 0 and not last:
                cut = len(self._held[:at].rstrip())  # the blanks belong to the text if this is no call
                plain, self._held = plain + self._held[:cut], self._held[cut:]
                return plain, calls
            body = self._held[at + len(begin) : stop if stop >= 0 else None]
            after = stop + len(end) if stop >= 0 else len(self._held)
            call = self._call(_object(body))
            if call is None:
                plain += self._held[:after]  # no call after all: the client sees what was written
            else:
                plain += self._held[:at].rstrip()
                calls.append(call)
            self._held = self._held[after:]

    def _bare(self, last: bool) -> tuple[str, list[dict[str, Any]]]:
        if not last and (not self._held.strip() or self._held.lstrip().startswith("{")) and not self._said:
            return "", []
        text, self._held = self._held, ""
        if self._said:
            return text, []
        calls = [self._call(_object(part)) for part in text.split(";")] if text.lstrip().startswith("{") else [None]
        found = [call for call in calls if call is not None]
        if len(found) == len(calls):
            return "", found
        one = self._call(_object(text))  # arguments may hold a semicolon
        return ("", [one]) if one is not None else (text, [])

    def _call(self, found: Any) -> dict[str, Any] | None:
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get(self._style.arguments, {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": found["name"], "arguments": text}
        return {"index": 0, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _tail(text: str, begin: str) -> int:
    """How many characters at the end of a text may be blanks before, and the beginning of, `begin`."""
    part = max(n for n in range(len(begin)) if text.endswith(begin[:n]))
    return len(text) - len(text[: len(text) - part].rstrip())
