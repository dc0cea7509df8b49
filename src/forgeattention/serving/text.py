"""Text from tokens."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers.decoders import DecodeStream

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A single byte as tokenizers with byte fallback write it."""


class TextStream:
    """Text of a request, piece by piece, held back where it may be the beginning of a stop text."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self._tokens: list[int] = []
        self._length = 0
        self._open = False
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token; `stopped` says whether a stop text was met."""
        new = self._decode.step(self._tokenizer.backend_tokenizer, token)
        self._tokens.append(token)
        self._open = new is None
        return self._cut(new or "")

    def flush(self) -> str:
        """What was held back, at the end; half a character is U+FFFD, as in a text that is decoded whole."""
        text = ""
        if self._open:
            text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)[self._length :]
            self._open = False
        text = self._cut(text)
        text, self._held = text + self._held, ""
        return text

    def _cut(self, new: str) -> str:
        self._length += len(new)
        self._held += new
        at = min((i for i in (self._held.find(s) for s in self._stop) if i >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            text, self._held = self._held[:at], ""
            return text
        keep = 0
        for s in self._stop:
            keep = max([keep] + [n for n in range(1, len(s)) if self._held.endswith(s[:n])])
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


class TokenTexts:
    """Single tokens as bytes and as text, for log-probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        inner = tokenizer.backend_tokenizer
        self._piece = inner.id_to_token
        self._added = {token: added.content for token, added in inner.get_added_tokens_decoder().items()}
        decoder = json.loads(inner.decoder.__getstate__()) if inner.decoder is not None else {}
        steps = decoder.get("decoders", [decoder])
        self._alphabet = _byte_level() if any(step.get("type") == "ByteLevel" for step in steps) else None

    def bytes(self, token: int) -> bytes:
        """A token's bytes, possibly a part of a character."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._piece(token) or ""
        if self._alphabet is not None:
            return b"".join(self._alphabet.get(char, char.encode()) for char in piece)
        if found := BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace("▁", " ").encode()

    def text(self, token: int) -> str:
        """A token's text; one that is no whole text is written "bytes:\\xe2\\x82", as OpenAI does."""
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: those of the generation config, or else of the config, and the tokenizer's own."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.get_text_config(decoder=True).eos_token_id
    found = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return {int(token) for token in found if token is not None}


def _byte_level() -> dict[str, bytes]:
    """The characters that byte-level BPE writes for bytes, after GPT-2's `bytes_to_unicode`: printable ones of
    Latin-1 stand for themselves, the others are numbered from 256 on."""
    themselves = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(b): bytes([b]) for b in themselves} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}
