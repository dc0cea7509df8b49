"""lm_eval's requests through the packed cache: the exact cache gives what lm_eval's own model gives."""

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from forgeattention.tools.evaluation import lm_eval_model
from tests import tiny


@pytest.fixture
def loaded(monkeypatch):
    model = tiny.llama(head_dim=64, hidden_size=64, vocab_size=257).float()
    monkeypatch.setattr(lm_eval_model.models, "load", lambda name, dtype, device: (model, tiny.tokenizer()))
    return model


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("t", 0, 1))


CONTEXT = "The quick brown fox jumps over the lazy dog. " * 12
CONTINUATIONS = [request("loglikelihood", CONTEXT, " " + end) for end in ("again", "and again", "no more of it")]


def scores(model):
    return [score for score, _ in model.loglikelihood(CONTINUATIONS)]


def test_the_exact_cache_scores_as_lm_eval_itself(loaded):
    own = HFLM(pretrained=loaded, tokenizer=tiny.tokenizer(), device="cpu", backend="causal", batch_size=2)
    ours = lm_eval_model.ForgeLM(cache="exact", block=100, batch_size=2)
    assert scores(ours) == pytest.approx(scores(own), rel=1e-4)


def test_scores_come_from_the_packed_cache(loaded):
    exact = scores(lm_eval_model.ForgeLM(cache="exact", batch_size=3))
    fine = scores(lm_eval_model.ForgeLM(preset="fidelity", batch_size=3))
    coarse = scores(lm_eval_model.ForgeLM(preset="small", batch_size=3))
    error = [sum(abs(a - b) for a, b in zip(exact, other)) for other in (fine, coarse)]
    assert 0 < error[0] < error[1]


def test_generation_runs_on_the_packed_cache(loaded):
    made = []
    model = lm_eval_model.ForgeLM(batch_size=1)
    make = model.make_cache
    model.make_cache = lambda: made.append(make()) or made[-1]
    (said,) = model.generate_until([request("generate_until", CONTEXT, {"until": ["\n"], "max_gen_toks": 6})])
    assert isinstance(said, str)
    (cache,) = made
    assert cache.get_seq_length() >= len(CONTEXT)
    assert all(layer.cache.packed_lengths[0] > 0 for layer in cache.layers)
    assert model.model.config._attn_implementation == "sdpa"


def test_what_is_not_known_is_refused(loaded):
    with pytest.raises(ValueError, match=r"^\[lm_eval\] expected preset in"):
        lm_eval_model.ForgeLM(preset="tiny")
    with pytest.raises(ValueError, match=r"^\[lm_eval\] expected cache 'packed' or 'exact'"):
        lm_eval_model.ForgeLM(cache="none")


def test_predictions_do_not_depend_on_the_padding_of_the_batch(loaded):
    one = lm_eval_model.ForgeLM(batch_size=1)
    three = lm_eval_model.ForgeLM(batch_size=3)
    assert scores(one) == pytest.approx(scores(three), rel=1e-3)
    assert torch.get_default_dtype() == torch.float32


def test_a_local_task_on_lm_evals_own_command_line(loaded, tmp_path, monkeypatch, capsys):
    """Documents, a task file, the model by name on the command line: what a user does, without a network."""
    documents = [{"text": f"{CONTEXT}{i} and", "choices": [" again", " no more"], "gold": i % 2} for i in range(3)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "task.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'documents.jsonl'}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    command = ["lm_eval", "run", "--model", "forgeattention", "--model_args", "pretrained=smollm2,preset=small"]
    command += ["--tasks", "local", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--output_path", str(tmp_path / "out")])
    lm_eval_model.main()
    (file,) = (tmp_path / "out").rglob("results*.json")
    result = json.loads(file.read_text())
    assert result["n-samples"]["local"]["effective"] == 3
    assert json.loads(result["config"]["forgeattention_spec"])["k_bits"] == 2
    assert "acc" in capsys.readouterr().out
