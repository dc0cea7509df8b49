"""EleutherAI's lm-evaluation-harness on a packed cache: any of its tasks, with any spec.

    python -m forgeattention.tools.evaluation.lm_eval_model run --model forgeattention \\
        --model_args pretrained=smollm2,preset=balanced --tasks gsm8k --device cpu

This is lm_eval's own command line with the model "forgeattention" added; importing the module adds it too. Prompts are
read in blocks, so that every prediction is made from what the packed cache holds by then, also where a task scores
given texts and generates nothing. Needs the extra "lm-eval".
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ... import models
from . import setup
from .streaming import attention, spans, step


@register_model("forgeattention")
class ForgeLM(HFLM):
    """lm_eval's transformers model with a packed cache.

    Args:
        pretrained: "smollm2", a folder, a .gguf file or a hub id.
        preset, k_bits, v_bits: how the cache is coded, as on the command line.
        cache: "packed", or "exact" for the same run with transformers' own cache.
        block: prompt tokens read at once.
        backend: which kernels run.
        dtype: torch dtype of the weights.
        device: torch device.
        options: of `HFLM`, such as batch_size and max_length.

    Raises:
        ValueError: an unknown preset or cache.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        preset: str | None = None,
        k_bits: int | None = None,
        v_bits: int | None = None,
        cache: str = "packed",
        block: int = 128,
        backend: str = "auto",
        dtype: str = "float32",
        device: str = "cpu",
        **options: Any,
    ) -> None:
        if preset is not None and preset not in setup.PRESETS:
            raise ValueError(f"[lm_eval] expected preset in {tuple(setup.PRESETS)}; got {preset!r}")
        if cache not in ("packed", "exact"):
            raise ValueError(f"[lm_eval] expected cache 'packed' or 'exact'; got {cache!r}")
        self.spec = setup.spec_from(Namespace(preset=preset, k_bits=k_bits, v_bits=v_bits))
        model, tokenizer = models.load(pretrained, dtype=getattr(torch, dtype), device=device)
        make_exact, make_packed = setup.caches(model, self.spec, backend)
        self.make_cache = make_packed if cache == "packed" else make_exact
        self.implementation = "forge" if cache == "packed" else None
        self.block = int(block)
        super().__init__(pretrained=model, tokenizer=tokenizer, device=device, backend="causal", **options)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary], each from the cache as it was at its token."""
        # Rows are padded on the right, behind everything that is looked at.
        cache = self.make_cache()
        with torch.no_grad(), attention(self.model, self.implementation):
            blocks = [step(self.model, inps[:, a:b], cache) for a, b in spans(inps.shape[1], self.block)]
        return torch.cat(blocks, 1)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> torch.Tensor:
        with attention(self.model, self.implementation):
            return super()._model_generate(
                context,
                max_length,
                stop,
                past_key_values=self.make_cache(),
                prefill_chunk_size=self.block,
                **generation_kwargs,
            )

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into its results of the model; the spec is in it."""
        return {**super().get_model_info(), "forgeattention_spec": self.spec.to_json()}


def main() -> None:
    """lm_eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
