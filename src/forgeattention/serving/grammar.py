"""Answers of a given form, by llguidance: JSON, JSON of a schema, calls of tools."""

from __future__ import annotations

import importlib.util
import json
import threading
from typing import Any

import numpy as np
import torch

WHITESPACE = r"[ \n\r\t]{0,40}"
"""Between the parts of JSON. Bounded, since a small model that may write blanks for ever sometimes does."""


def as_json(schema: Any) -> str:
    """A schema as llguidance reads it."""
    schema = {} if schema is True else schema
    if isinstance(schema, dict) and "x-guidance" not in schema:
        schema = schema | {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}}
    return json.dumps(schema)


class Grammars:
    """Compiles grammars for one model.

    Args:
        tokenizer: the model's fast tokenizer.
        vocabulary: size of the model's logits.
        ends: the model's end tokens; one of them follows a text that is whole.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: set[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._lock = threading.Lock()
        self._tokens: Any = None

    def json(self, schema: Any) -> Grammar:
        """JSON that a schema allows.

        Raises:
            ValueError: a schema that llguidance cannot follow, or no llguidance.
        """
        return self.lark(f"%llguidance {{}}\nstart: %json {as_json(schema)}\n")

    def lark(self, text: str) -> Grammar:
        """Texts of a grammar in llguidance's form of Lark.

        Raises:
            ValueError: a grammar that it cannot follow, or no llguidance.
        """
        tokens = self._loaded()
        from llguidance import LLMatcher

        made = LLMatcher(tokens, LLMatcher.grammar_from_lark(text), log_level=0)
        if made.is_error():
            raise ValueError(_first_line(made.get_error()))
        return Grammar(made, self._vocabulary)

    def literal(self, text: str) -> str:
        """Lark for a text that is a token of its own in some vocabularies.

        Raises:
            ValueError: no llguidance.
        """
        token = self._tokenizer.convert_tokens_to_ids(text)
        own = (
            isinstance(token, int) and token != self._tokenizer.unk_token_id and self._loaded().is_special_token(token)
        )
        return text if own else json.dumps(text)

    def _loaded(self) -> Any:
        if importlib.util.find_spec("llguidance") is None:
            raise ValueError("needs llguidance on the server: pip install 'forgeattention[structured]'")
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._tokens is None:
                self._tokens = from_tokenizer(self._tokenizer, self._vocabulary, self._ends or None)
        return self._tokens


class Grammar:
    """Where an answer is in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next, as bools [vocabulary].

        Raises:
            ValueError: a grammar that became too large.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool))

    def take(self, token: int) -> None:
        """One more token.

        Raises:
            ValueError: a token that may not come next.
        """
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> Grammar:
        """The same place, for another answer."""
        return Grammar(self._matcher.deep_copy(), self._vocabulary)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"[serve] the answer left its grammar: {_first_line(self._matcher.get_error())}")


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:300]
