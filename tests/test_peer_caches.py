"""The benchmarks' simulated caches: what each does to states, and that a cache of them is as exact as it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import candidates
import fidelity_measure
import peer_caches

DIM = 64
PEERS = peer_caches.peers(DIM)


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_coded_states_are_near_and_not_the_states_themselves(peer: peer_caches.Peer) -> None:
    x = states(2, 1, 128, DIM)
    for side, coder in (("keys", peer.keys), ("values", peer.values)):
        error = float((coder(x, 0) - x).square().mean().sqrt())
        bits = 8 if "8" in peer.name.split()[0] or "8-bit" in peer.name else 2
        assert 1e-4 < error < (0.02 if bits == 8 else 0.6), side


def test_levels_are_the_published_ones_of_the_normal() -> None:
    # Max, "Quantizing for minimum distortion", 1960, table I: 8 levels at 0.2451, 0.7560, 1.344, 2.152.
    assert peer_caches._centroids(3)[4:].tolist() == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=1e-3)


def test_bits_count_scales_and_layers_left_exact() -> None:
    by_name = {peer.name: peer for peer in peer_caches.peers(128)}
    # The bytes of a slot that vLLM states at head_dim 128, for a key and a value together: 102 and 134.
    assert by_name["TurboQuant 3-bit (vLLM)"].effective_bits == pytest.approx(102 * 8 / 256)
    assert by_name["TurboQuant 4-bit (vLLM)"].effective_bits == pytest.approx(134 * 8 / 256)
    ends = by_name["TurboQuant 3-bit (vLLM), 2 + 2 layers exact"]
    config = LlamaConfig(num_hidden_layers=28)
    assert ends.bits(config) == pytest.approx((24 * 102 * 8 / 256 + 4 * 16) / 28)
    # KVarN's record of 128 tokens at head_dim 256: 26,880 bytes.
    kvarn = next(p for p in peer_caches.peers(256) if p.name.startswith("KVarN"))
    assert kvarn.effective_bits == pytest.approx(26_880 * 8 / (2 * 128 * 256))


def test_rotations_are_undone() -> None:
    x = states(1, 1, 4, DIM)
    torch.testing.assert_close(peer_caches.rotated(x, DIM, lambda y: y), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(peer_caches.variance_normalised(states(1, 1, 128, DIM), 12, -1), states(1, 1, 128, DIM),
                               atol=0.02, rtol=0)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(head_dim=DIM, num_hidden_layers=6, hidden_size=128, initializer_range=0.1).float()


def test_first_and_newest_tokens_stay_exact_and_ends_too(model: Any) -> None:
    peer = next(p for p in PEERS if p.name == "KIVI 2-bit, groups of 32")
    cache = peer_caches.make_cache(model.config, peer, sinks=4, window=64)
    k = states(1, 1, 300, DIM)
    for start, stop in ((0, 200), (200, 299), (299, 300)):
        held, _ = cache.layers[0].update(k[:, :, start:stop], k[:, :, start:stop])
    same = (held == k).all(-1)[0, 0]
    assert same[:4].all()
    assert not same[4 : 4 + 192].any()
    assert same[4 + 192 :].all()
    ends = next(p for p in PEERS if p.ends)
    layers = model.config.num_hidden_layers
    assert peer_caches.coded_layers(model.config, ends) == list(range(2, layers - 2))


def test_compare_measures_every_position_against_the_exact_cache(model: Any) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 400))
    chosen = [c for c in candidates.candidates(model, "field") if c.name in ("exact", "preset balanced", PEERS[0].name)]
    found = fidelity_measure.compare(model, ids, chosen, block=100)
    assert found["exact"]["kl"] == 0.0
    assert found["exact"]["same_top"] == 1.0
    for name in ("preset balanced", PEERS[0].name):
        row = found[name]
        each = fidelity_measure.unpack(row["each"])
        assert row["positions"] == each.size == 400
        assert row["kl"] == pytest.approx(float(each.mean()), rel=1e-5)
        # Nothing is coded before 4 + 64 + 128 tokens lie behind, and all that follows is measured.
        assert row["kl"] > 0
    whole = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(ids, past_key_values=whole).logits[:, 200:].float().log_softmax(-1)
    assert found["exact"]["loss"] == pytest.approx(fidelity_measure.loss_of(logits, ids, 200) / 398, rel=1e-4)


def test_the_models_first_tokens_stand_in_front_of_every_piece() -> None:
    class Tokenizer:
        eos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None) -> Any:
            ids = [5 + ord(c) % 7 for c in text]
            ids = [2, *ids] if add_special_tokens else ids
            return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    pieces = fidelity_measure.documents(Tokenizer(), 2, 50, ["genesis"])["genesis"]
    assert [len(piece) for piece in pieces] == [50, 50]
    assert all(piece[0] == 2 and (piece[1:] != 2).all() for piece in pieces)
