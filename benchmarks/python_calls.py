"""Python calls of a decode step, per layer: what runs on the host between two kernels.

    python benchmarks/python_calls.py [--json OUT] [--tokens 200]

Counts calls of Python functions of this package (and of transformers' cache) with sys.setprofile, in the steps of a
tiny model on the CPU backend. A step in which no page fills is counted, as 63 of 64 are.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import forgeattention
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.util.environment import environment

HOME = str(Path(forgeattention.__file__).parent)
LAYERS = 2, 6
"""Two depths: their difference leaves out what a step costs whatever the number of layers."""


def model(layers: int) -> Any:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="forge").eval()


def calls_of_a_step(layers: int, tokens: int) -> collections.Counter[str]:
    """Calls by "file:function" in one decode step after a prompt."""
    made = model(layers)
    cache, found = ForgeCache(made), collections.Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and (name.startswith(HOME) or name.endswith("cache_utils.py")):
            found[f"{name.removeprefix(HOME + '/').rpartition('site-packages/')[2]}:{frame.f_code.co_name}"] += 1

    with torch.inference_mode():
        made(torch.randint(1, 97, (1, tokens)), past_key_values=cache)
        one = torch.tensor([[5]])
        made(one, past_key_values=cache)
        sys.setprofile(note)
        try:
            made(one, past_key_values=cache)
        finally:
            sys.setprofile(None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=200, help="of the prompt")
    args = parser.parse_args()
    few, many = (calls_of_a_step(layers, args.tokens) for layers in LAYERS)
    per_layer = {name: (many[name] - few[name]) / (LAYERS[1] - LAYERS[0]) for name in many}
    per_layer = {name: count for name, count in per_layer.items() if count}
    files = {name.partition(":")[0] for name in per_layer}
    for name, count in sorted(per_layer.items(), key=lambda x: -x[1]):
        print(f"{count:6.2f}  {name}")
    print(f"{sum(per_layer.values()):6.2f}  calls per layer, in {len(files)} files")
    total = sum(per_layer.values())
    result = {"tokens": args.tokens, "calls_per_layer": total, "files": len(files), "calls": per_layer}
    if args.json is not None:
        args.json.write_text(json.dumps({"env": environment(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
