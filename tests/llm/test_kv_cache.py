"""A quantized cache of keys and values: what it holds, and that `generate` decodes as if floats had been rounded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gs_algos import PTQ, quantize_weights
from gs_algos.cli.app import run
from gs_algos.llm.decode import Decoder, generate
from gs_algos.llm.decode import run as decode
from gs_algos.llm.kv_store import RECENT, KiviStore, TokenStore, kivi_codes, pack_rows, unpack_rows
from gs_algos.llm.load import load_language_model
from gs_algos.llm.perplexity import perplexity
from gs_algos.ptq.kv import KVScheme
from gs_kernels.runtime.dispatch import INTERPRET
from tests.llm.recorded_graph import RecordedGraphs
from tests.nets.convolutional import images, mlp
from tests.nets.language_models import save_folder, tiny_llama
from tests.nets.transformers_models import LANGUAGE_MODELS, tiny_language_model

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: nothing here is a kernel")

WITH_POSITIONS = [name for name in LANGUAGE_MODELS if name not in ("MambaConfig", "BloomConfig")]
KIVI = "int2@kivi:8"
NEW = 12


def cache_of(model: Any, kv: str) -> Any:
    from gs_algos.llm.kv_cache import kv_cache

    return kv_cache(model, kv)


def padded() -> tuple[Tensor, Tensor]:
    """Two prompts of 12 tokens, the second with padding on the left, and their mask."""
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :5] = mask[1, :5] = 0
    return ids, mask


def drawn(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1))


def without_end(name: str = "LlamaConfig", **options: Any) -> Any:
    return tiny_language_model(name, eos_token_id=None, **options)


def stepwise(model: Any, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of tokens that go through the cache one at a time."""
    parts = []
    with torch.no_grad():
        for i in range(ids.shape[1]):
            positions = (mask[:, : i + 1].sum(-1, keepdim=True) - 1).clamp(min=0)
            out = model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=positions, cache=cache)
            parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", WITH_POSITIONS)
def test_tokens_one_by_one_give_the_logits_of_all_at_once(name: str):
    model = without_end(name)
    ids, mask = padded()
    with torch.no_grad():
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        want = model(ids, **options, cache=cache_of(model, "int8@token")).logits
        floats = model(ids, **options).logits
        got = stepwise(model, cache_of(model, "int8@token"), ids, mask)
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-3, atol=1e-3)
    assert 1e-6 < float((want - floats)[real].square().mean() / floats[real].square().mean()) < 1e-2


@pytest.mark.parametrize(("kv", "per_token"), [("int8@token", 32 + 4), ("int4@token", 16 + 4)])
def test_memory_is_that_of_codes_and_scales(kv: str, per_token: int):
    model = tiny_llama(hidden_size=128)  # 2 heads of keys and of values in each of 2 layers, of 32 numbers
    cache = cache_of(model, kv)
    with torch.no_grad():
        model(torch.ones(3, 128, dtype=torch.int64) * 5, cache=cache, position_ids=torch.zeros(3, 128).long())
    assert cache.nbytes == 3 * 128 * 2 * 2 * 2 * per_token
    assert cache.layers[0].keys is None and cache.get_seq_length() == 128


@pytest.mark.parametrize("kv", ["int8@token", "int4@token", KIVI])
@pytest.mark.parametrize("name", ["LlamaConfig", "Gemma2Config"])
def test_beams_reorder_codes_as_they_would_floats(kv: str, name: str, monkeypatch: pytest.MonkeyPatch):
    from transformers import DynamicCache

    model = without_end(name)
    ids, mask = padded()
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    if kv == KIVI:  # nothing is old enough to be rounded
        want = model.generate(**options, cache=DynamicCache(config=model.config))
        assert torch.equal(model.generate(**options, cache=cache_of(model, kv)), want)
        return
    got = model.generate(**options, cache=cache_of(model, kv))
    # the same decoding with floats that were rounded as they were written
    from gs_algos.llm import kv_store

    class Rounded(kv_store.TokenStore):
        def append(self, x: Tensor) -> None:
            store = TokenStore(self.scheme, x)
            store.append(x)
            held = store.read(torch.float32)
            self.floats = held if self.floats is None else torch.cat([self.floats, held], 2)
            self.end = self.floats.shape[2]

        def __init__(self, scheme: KVScheme, like: Tensor, room: int = 0) -> None:
            super().__init__(scheme, like, room)
            self.scheme, self.floats = scheme, None

        def read(self, dtype: torch.dtype) -> Tensor:
            return self.floats[:, :, self.first : self.end]

        def take_rows(self, take: Any) -> None:
            self.floats = take(self.floats)

    monkeypatch.setattr(kv_store, "TokenStore", Rounded)
    assert torch.equal(got, model.generate(**options, cache=cache_of(model, kv)))


def test_a_rotation_spreads_what_one_channel_has():
    k = drawn(1, 1, 50, 64)
    k[..., 3] += 40
    errors = []
    for rotated in (False, True):
        store = TokenStore(KVScheme(4), k)
        store.rotated = rotated
        store.append(k)
        errors.append(float((store.read(torch.float32) - k).square().mean()))
    assert errors[1] < errors[0] / 3


def test_kivi_rounds_keys_by_channel_and_values_by_token():
    x = drawn(1, 2, 8, 16)
    for axis in (2, 3):
        codes, scale, low = kivi_codes(x, 8, axis, 3)
        assert scale.shape == ((1, 2, 1, 16) if axis == 2 else (1, 2, 8, 2))
        parts = x.unflatten(axis, (-1, 8))
        got = codes.float().unflatten(axis, (-1, 8)) * scale.float().unsqueeze(axis + 1) + low.unsqueeze(axis + 1)
        assert float((got - parts).abs().max()) <= float(scale.max()) * 0.51
        assert set(codes.unique().tolist()) == {0, 1, 2, 3}


def test_a_constant_group_of_kivi_has_scale_one_and_is_exact():
    codes, scale, low = kivi_codes(torch.full((1, 1, 4, 4), 0.5), 4, 2, 15)
    assert (scale == 1).all() and (low == 0.5).all() and (codes == 0).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes_come_back_also_of_odd_sizes(bits: int):
    codes = (torch.arange(2 * 3 * 11, dtype=torch.uint8) % 2**bits).view(2, 3, 11)
    packed = pack_rows(codes, bits)
    assert packed.shape == (2, 3, -(-11 * bits // 8)) and torch.equal(unpack_rows(packed, bits, 11), codes)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize(("bits", "error"), [(2, 0.2), (4, 0.01)])
def test_kivi_leaves_the_last_tokens_float_and_rounds_whole_groups(axis: int, bits: int, error: float):
    x, store = drawn(1, 1, 300, 32), KiviStore(KVScheme(bits, 32), drawn(1, 1, 1, 32), axis)
    for part in x.split(1, 2):
        store.append(part)
        store.settle()
    assert store.tokens == 300
    rounded = store.codes.shape[2]
    assert rounded % 32 == 0 and RECENT <= 300 - rounded < RECENT + 32
    got = store.read(torch.float32)
    assert torch.equal(got[:, :, rounded:], x[:, :, rounded:])
    assert error / 20 < float((got - x)[:, :, :rounded].square().mean()) < error
    assert store.nbytes < 0.7 * x.nbytes


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("count", [5, 150, 270, 300])
def test_kivi_crops_within_a_group(axis: int, count: int):
    x = drawn(1, 1, 300, 32)
    store = KiviStore(KVScheme(2, 32), x, axis)
    store.append(x)
    store.settle()
    want = store.read(torch.float32)[:, :, : 300 - count]
    store.crop(count)
    assert store.tokens == 300 - count and torch.equal(store.read(torch.float32), want)
    store.append(x[:, :, :2])
    assert torch.equal(store.read(torch.float32)[:, :, -2:], x[:, :, :2])


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig"])
def test_a_crop_gives_back_what_was_before(name: str):
    model = without_end(name)
    ids = padded()[0][:1]
    with torch.no_grad():
        cache = cache_of(model, "int8@token")
        cache.activate_past_recording()
        model(ids, cache=cache)
        cache.crop(-5)
        again = model(ids[:, 7:], cache=cache).logits
        want = model(ids, cache=cache_of(model, "int8@token")).logits[:, 7:]
    torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LlamaConfig", "Gemma3TextConfig", "GPT2Config"])
@pytest.mark.parametrize("kv", ["int8@token", "int4@token"])
def test_a_step_that_is_recorded_once_decodes_with_codes(name: str, kv: str):
    model, graphs = without_end(name), RecordedGraphs()
    ids, mask = padded()
    scheme = KVScheme.parse(kv)
    got = decode(Decoder(model, batch=2, length=12 + NEW, capture=graphs, kv=scheme), ids, mask, max_new_tokens=NEW)
    want = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, cache=cache_of(model, kv)
    )
    assert torch.equal(got, want[:, 12:])
    assert (graphs.made, graphs.replays) == (1, NEW - 1)
    assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW, kv=kv), want)


def test_kivi_is_decoded_without_a_graph_and_says_so(caplog: pytest.LogCaptureFixture):
    model = without_end()
    with caplog.at_level(logging.WARNING, "gs_algos"):
        decoder = Decoder(model, length=32, capture=RecordedGraphs(), kv=KVScheme(2, 8))
    assert decoder.capture is None and "no CUDA graph, as int2@kivi:8" in caplog.text


def test_ptq_records_the_scheme_and_generate_follows_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    import gs_algos
    from gs_algos.llm.kv_cache import QuantizedKVCache

    ids = {"input_ids": torch.arange(3, 15)[None]}
    algo = PTQ(weight="int8@channel", rounding="nearest", kv="int8@token")
    model = algo.convert(algo.apply(without_end(), ids))
    assert "int8@token" in str(algo.plan(without_end(), ids))
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    want = model.generate(**ids, **options)
    assert isinstance(want.cache, QuantizedKVCache) and type(model).__name__ == "LlamaForCausalLM"
    save_folder(tmp_path / "folder", model)
    loaded, _ = load_language_model(tmp_path / "folder")
    gs_algos.save(model, tmp_path / "saved")
    again = gs_algos.load(tmp_path / "saved", without_end)
    for other in (loaded, again):
        got = other.generate(**ids, **options)
        assert isinstance(got.cache, QuantizedKVCache) and torch.equal(got.sequences, want.sequences)
    from transformers import DynamicCache

    with caplog.at_level(logging.WARNING, "gs_algos"):
        own = loaded.generate(**ids, **options, cache=DynamicCache(config=loaded.config))
    assert type(own.cache) is DynamicCache and "stay float, not int8@token: the DynamicCache" in caplog.text


def test_commands_take_and_record_a_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, target = save_folder(tmp_path / "float", tiny_llama()), tmp_path / "packed"
    text = tmp_path / "text.txt"
    text.write_text("in the beginning was a word and it said let there be light so they saw " * 8)
    assert run(["quantize", str(source), str(target), "--weights", "int8@channel", "--kv", "int4@token"]) == 0
    assert run(["info", str(target)]) == 0
    assert "kv=int4@token" in capsys.readouterr().out
    told = {}
    for kv in ("", "none", "int4@token", "int2@kivi:8"):
        assert run(["perplexity", str(target), "--text", str(text), "--context", "32", "--kv", kv]) == 0
        told[kv] = capsys.readouterr().out.split(" over")[0]
    assert run(["generate", str(target), "in the", "--max-new-tokens", "3", "--kv", "int2@kivi:8"]) == 0
    assert told[""] == told["int4@token"] != told["none"]
    assert run(["generate", str(target), "in the", "--kv", "int3@token"]) == 2
    assert "kv must be int8@token, int4@token, int4@kivi:32 or int2@kivi:32, got" in capsys.readouterr().err


def test_what_leaves_for_another_engine_says_that_its_cache_does_not(tmp_path: Path, capsys, monkeypatch):
    source, packed = save_folder(tmp_path / "float", tiny_llama(tied=False)), tmp_path / "packed"
    assert run(["quantize", str(source), str(packed), "--weights", "int8@channel", "--kv", "int8@token"]) == 0
    capsys.readouterr()
    assert run(["export", str(packed), str(tmp_path / "out"), "--to", "compressed-tensors"]) == 0
    words = "keys and values are not int8@token there: "
    assert f"note: {words}what reads it makes a cache of its own" in capsys.readouterr().out
    monkeypatch.setattr("gs_algos.cli.serve.shutil.which", lambda name: "/usr/bin/vllm")
    assert run(["serve", str(packed), "--dry-run"]) == 0
    assert f"note: {words}vLLM makes a cache of its own; --kv-cache-dtype fp8" in capsys.readouterr().err


def test_perplexity_reads_what_the_cache_holds():
    model, ids = tiny_llama(), torch.randint(3, 32, (128,), generator=torch.Generator().manual_seed(0))
    plain = perplexity(model, ids, 32, progress=False).value
    values = {kv: perplexity(model, ids, 32, progress=False, kv=kv).value for kv in ("none", "int8@token", KIVI)}
    assert values["none"] == plain
    assert values["int8@token"] != plain and values["int8@token"] == pytest.approx(plain, rel=1e-2)
    assert values[KIVI] == pytest.approx(plain, rel=1e-5)  # a window of 32 is all recent


@pytest.mark.parametrize("kv", ["int8", "int8@tensor", "int8@kivi:8", "int2@kivi", "int2@kivi:0", "int2@kivi:3", "", 8])
def test_other_schemes_are_refused(kv: Any):
    with pytest.raises(ValueError, match=r"PTQ: (kv must be int8@token|the group of int2@kivi:. must divide the 128)"):
        PTQ(kv=kv)


def test_networks_without_such_a_cache_are_refused():
    with pytest.raises(ValueError, match="PTQ: kv quantizes the cache of a language model of Transformers, got a Seq"):
        PTQ(kv="int8@token").apply(mlp(), images())
    with pytest.raises(ValueError, match="the group of int2@kivi:32 must divide the size of a head, got 32 and 16"):
        PTQ(weight="int8@channel", kv="int2@kivi:32").plan(tiny_llama(), torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs a layer with a cache of tokens, got only LinearAttentionLayer"):
        cache_of(without_end("MambaConfig"), "int8@token")
    with pytest.raises(ValueError, match="kv goes with activations that are float or 'int8@token'"):
        PTQ(act="int8@tensor", kv="int8@token")
    with pytest.raises(ValueError, match="without one"):
        perplexity(torch.nn.Embedding(9, 9), torch.arange(9), 4, progress=False, kv="int8@token")


def test_a_model_packed_without_a_scheme_is_left_as_it_is():
    model = tiny_llama()
    kind = type(model)
    quantize_weights(model, "int8@channel", progress=False)
    assert type(model) is kind and model.config.quantization_config.to_dict().get("kv") is None
