"""Prompts from text: bounded before they are tokenised, off the event loop, and with user text kept literal."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tokenizers import Tokenizer

T = TypeVar("T")

SLICE = 32_768
"""Characters that are tokenised at a time to see whether a long text can fit."""
SLACK = 1.1
"""A text cut into slices may have a few tokens more than whole; it is refused from this many times the limit on, and
below that by its exact number."""
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Noncharacters of Unicode, which no text may contain: one of them marks user text inside a rendered template."""


class TooLong(ValueError):
    """A prompt that cannot fit, refused before all of it is tokenised."""


class Prompts:
    """Tokens of texts and of chats.

    Args:
        tokenizer: the model's fast tokenizer.
        limit: most tokens of a prompt.
        threads: how many prompts are prepared at once; tokenizers let the other threads go on meanwhile.
    """

    def __init__(self, tokenizer: Any, limit: int, threads: int = 2) -> None:
        self.limit = limit
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(threads, "prompts")
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        special = sorted({token.content for token in added if token.special and token.content})
        self._find = re.compile(any_of(special))
        self._renamed = {text: f"<{secrets.token_hex(16)}>" for text in special}
        # Seconds for a vocabulary of 262,144, so it is made while the server starts.
        self._literal = self._pool.submit(renamed, tokenizer, self._renamed) if special and self.template else None

    @property
    def template(self) -> str:
        """The source of the chat template, "" where there is none; of several, all."""
        found = self._tokenizer.chat_template or ""
        return "\n".join(found.values()) if isinstance(found, Mapping) else found

    async def run(self, action: Callable[..., T], *args: Any) -> T:
        """Runs an action in a thread for prompts."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, action, *args)

    def text(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with those that the tokenizer puts before it; the texts of special tokens in it
        are these tokens, as fill-in-the-middle prompts need them.

        Raises:
            TooLong: more than `limit` tokens.
        """
        return self._encode(lambda part: self._tokenizer(part).input_ids, text)

    def chat(self, messages: list[dict[str, Any]], tools: list[Any] | None, options: dict[str, Any]) -> list[int]:
        """Tokens of a chat by the model's template. The texts of special tokens inside messages and tools are literal
        text, so nobody can end his turn and write another's.

        Args:
            messages: what the template reads.
            tools: functions that the template is told of.
            options: more of the template's variables.

        Raises:
            TooLong: more than `limit` tokens.
            Exception: what the template raises for messages that it cannot write.
        """
        said = json.dumps([messages, tools], ensure_ascii=False)
        mark = ""
        if self._literal is not None and self._find.search(said):
            mark = next(mark for mark in MARKS if mark not in said)
            messages, tools = self._marked(messages, mark), self._marked(tools, mark)
        text = self._tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
        )
        if not mark:
            return self._encode(lambda part: self._tokenizer(part, add_special_tokens=False).input_ids, text)
        genuine = re.compile(f"{self._find.pattern}(?!{mark})")
        text = genuine.sub(lambda found: self._renamed[found[0]], text).replace(mark, "")
        assert self._literal is not None
        literal = self._literal.result()
        return self._encode(lambda part: literal.encode(part, add_special_tokens=False).ids, text)

    def _marked(self, value: Any, mark: str) -> Any:
        """The same messages with a mark in every special token's text, after its first character."""
        if isinstance(value, str):
            return self._find.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, Mapping):
            return {key: self._marked(item, mark) for key, item in value.items()}
        return [self._marked(item, mark) for item in value] if isinstance(value, list) else value

    def _encode(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        if len(text) > max(SLICE, 2 * self.limit):
            count, at = 0, 0
            while at < len(text):
                count += len(encode(text[at : at + SLICE]))
                at += SLICE
                if count > SLACK * self.limit + SLICE // 64:
                    raise TooLong(f"[serve] expected at most {self.limit} tokens of prompt and answer; got more")
        return encode(text)


def renamed(tokenizer: Any, names: Mapping[str, str]) -> Tokenizer:
    """A tokenizer that is the same but for the texts of some of its added tokens: the old ones are plain text to it.

    Args:
        tokenizer: a fast tokenizer of transformers.
        names: new texts by the old ones.
    """
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in made["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = made["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    made["truncation"] = made["padding"] = None
    return Tokenizer.from_str(json.dumps(made))


def any_of(texts: Iterable[str]) -> str:
    """A regular expression of the longest of some texts at a place, which looks at each of its characters once."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    if not tree:
        return "(?!)"

    def write(node: dict[str, Any]) -> str:
        options = "|".join(re.escape(char) + write(after) for char, after in node.items() if char)
        return f"(?:{options})" + ("?" if "" in node else "") if options else ""

    return write(tree)
