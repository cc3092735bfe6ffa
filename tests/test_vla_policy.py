"""The policy of gipo_vla_libero.py: parity with the public OpenVLA-OFT code on a tiny configuration (tests/data), and its files.

openvla_tiny.npz holds outputs of that code; weights, images and prompts are regenerated here by the rule it was made with. Every
parity test has its negative controls: the mistakes that users of other code bases have lost days to must be noticed.
"""

import copy
import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import gipo_vla_libero as vla

G = dict(np.load(Path(__file__).parent / "data" / "openvla_tiny.npz", allow_pickle=False))
VARIANTS = [(n, stop) for n in (1, 2) for stop in (True, False)]
STATS = {"q01": G["q01"].tolist(), "q99": G["q99"].tolist(), "mask": G["norm_mask"].tolist()}
GOLDEN = vla.PolicyConfig(
    vla.TowerConfig(32, 3, 2, 64, 5, True), vla.TowerConfig(48, 3, 2, 96), image_size=28, hidden=64, layers=2, heads=4, ffn=128,
    vocab=512, padded_vocab=576, pad=512, blank=3,
)  # fmt: skip


def make_args(**changes):
    defaults = {
        "suite": "libero_spatial", "unnorm_key": "auto", "num_images": 1, "use_proprio": False, "append_stop": True,
        "attention": "bidirectional", "preprocess": "oft", "jpeg": False, "center_crop": True, "temperature": 1.0,
        "train": "lora", "lora_rank": 4, "lora_alpha": 2, "gradient_checkpointing": False, "dtype": "float32",
        "torch_compile": False, "cuda": False, "seed": 1,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **changes})


# ---- the generation rule of the golden file
def noise(name, count):
    """`count` float64 values in [-1, 1) by integer arithmetic (murmur3 finaliser), the same on every platform."""
    mask = np.uint64(0xFFFFFFFF)
    h = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B1) + np.uint64(zlib.crc32(("tiny1928." + name).encode()))
    h &= mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) & mask
    h ^= h >> np.uint64(16)
    return h.astype(np.float64) / 2147483648.0 - 1.0


def weight(key, shape):
    u = noise(key, int(np.prod(shape))).reshape(shape)
    if key.endswith("scale_factor"):
        v = 0.5 + 0.1 * u
    elif key.endswith(".bias"):
        v = 0.1 * u
    elif key.endswith(".weight") and len(shape) == 1:
        v = 1.0 + 0.1 * u
    elif key.endswith(".weight"):
        gain = 4.0 if key.endswith(("q_proj.weight", "k_proj.weight")) else 2.5
        v = u * (gain / math.sqrt(int(np.prod(shape[1:]))))
        if key.endswith("lm_head.weight"):
            v[:256] *= 0.05
            v[512:] *= 0.05
    else:
        v = 0.5 * u
    return v.astype(np.float32)


def pixel_values(images):
    full = (1.5 * noise("pixel_values", 3 * 12 * 28 * 28)).reshape(3, 12, 28, 28).astype(np.float32)
    return torch.from_numpy(full[:, : 6 * images].copy())


def prompts():
    ids = [((noise(f"prompt.{i}", n - 2) + 1.0) * 126.0).astype(np.int64) for i, n in enumerate((7, 9, 12))]
    return [[1, *(4 + h).tolist(), 3] for h in ids]


def camera_image():
    """(256, 256, 3) uint8"""
    y, x, c = np.mgrid[0:256, 0:256, 0:3].astype(np.int64)
    v = (3 * x + 5 * y + 40 * c) % 256
    v = np.where((x - 100) ** 2 + (y - 140) ** 2 < 3600, 255 - v, v)
    v = np.where((x >= 180) & (y < 60), 255 * ((x // 4 + y // 4 + c) % 2), v)
    v = np.where((x < 40) & (y >= 200), 60 * c + 17, v)
    n = ((noise("image", 256 * 256 * 3).reshape(256, 256, 3) + 1.0) * 8.5).astype(np.int64) - 8
    return np.clip(v + n, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def weights():
    """All 130 tensors of the checkpoint, also those that never run; equal to the reference's by checksum."""
    state = {}
    for key, shape, crc in zip(G["weight_keys"].tolist(), G["weight_shapes"], G["weight_crc32"], strict=True):
        w = weight(key, tuple(int(n) for n in shape if n))
        assert zlib.crc32(w.astype("<f4").tobytes()) == int(crc), key
        state[key] = torch.from_numpy(w)
    return state


def golden_agent(weights, config=GOLDEN, **switches):
    """Weights put in by hand, so that the loader is not what makes parity."""
    agent = vla.Agent(config, **switches)
    state = {key: w for key, w in weights.items() if key in agent.state_dict()}
    state["language_model.lm_head.weight"] = weights["language_model.lm_head.weight"][256:512]
    missing, _ = agent.load_state_dict(state, strict=False)
    assert all(key.startswith("value_head") for key in missing)
    return agent


def inputs(images=1):
    return pixel_values(images), *vla.pad_prompts(prompts(), GOLDEN)


@torch.no_grad()
def outputs(agent, images=1):
    pixels, ids, lengths = inputs(images)
    vision = agent.vision_backbone(pixels)
    logits, hidden = agent(pixels, ids, lengths)
    return {"vision": vision, "projected": agent.projector(vision), "hidden": hidden, "logits": logits}


def difference(agent, images=1, stop=True):
    """Largest differences from the stored outputs, and the argmax agreement."""
    out, name = outputs(agent, images), f"img{images}_{'stop' if stop else 'nostop'}"
    result = {key: np.abs(out[key].numpy() - G[f"img{images}_{key}"]).max() for key in ("vision", "projected")}
    result["hidden"] = np.abs(out["hidden"].numpy() - G[name + "_hidden"]).max()
    result["argmax"] = (out["logits"].argmax(-1).numpy() == G[name + "_argmax"]).mean()
    return result


# -------------------- Parity --------------------
@pytest.mark.parametrize(("images", "stop"), VARIANTS)
def test_parity_with_the_reference(weights, images, stop):
    agent, name = golden_agent(weights, num_images=images, append_stop=stop), f"img{images}_{'stop' if stop else 'nostop'}"
    out, diff = outputs(agent, images), difference(agent, images, stop)
    assert max(diff["vision"], diff["projected"], diff["hidden"]) < 1e-4, diff
    logits = out["logits"].numpy()
    np.testing.assert_allclose(logits[:, G["logit_positions"]], G[name + "_logits_sub"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits.sum(-1), G[name + "_logits_sum"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(logits, axis=-1), G[name + "_logits_l2"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits.max(-1), G[name + "_logits_max"], atol=1e-4, rtol=0)
    assert (logits.argmax(-1) == G[name + "_argmax"]).all()
    if name == "img1_stop":
        np.testing.assert_allclose(logits, G["img1_stop_logits"], atol=1e-4, rtol=0)
    tokens, *_ = agent.get_action_and_logprob(*inputs(images), deterministic=True)
    values = vla.token_to_value(tokens.numpy())
    np.testing.assert_allclose(values, G[name + "_actions_normalized"], atol=1e-6)
    np.testing.assert_allclose(vla.unnormalize(values, STATS), G[name + "_actions"], atol=1e-6)
    # One at a time and padded to a multiple of 32 must not matter.
    agent.pad_multiple = 32
    for i, ids in enumerate(prompts()):
        with torch.no_grad():
            _, hidden = agent(pixel_values(images)[i : i + 1], *vla.pad_prompts([ids], GOLDEN))
        assert np.abs(hidden[0].numpy() - G[name + "_hidden"][i]).max() < 1e-4



def mistake_causal(agent, monkeypatch):
    agent.causal = True


def mistake_padding_not_masked(agent, monkeypatch):
    embed, token = agent.embed, agent.language_model["model"].embed_tokens.weight[512]

    def without_mask(*a):
        x, real, start = embed(*a)
        return torch.where(real[..., None], x, token), real | True, start

    monkeypatch.setattr(agent, "embed", without_mask)


def mistake_stop_left_out(agent, monkeypatch):
    agent.append_stop = False


def mistake_read_later(agent, monkeypatch, by=1):
    decode = agent.decode
    monkeypatch.setattr(agent, "decode", lambda x, real, start: decode(x, real, start + by))


def mistake_read_earlier(agent, monkeypatch):
    mistake_read_later(agent, monkeypatch, by=-1)


def mistake_placeholder_embedding(agent, monkeypatch):
    embed, token = agent.embed, agent.language_model["model"].embed_tokens.weight[1]

    def with_token(*a):
        x, real, start = embed(*a)
        position = torch.arange(x.shape[1])
        place = (position > start[:, None]) & (position <= start[:, None] + 56)
        return torch.where(place[..., None], token, x), real, start

    monkeypatch.setattr(agent, "embed", with_token)


def mistake_channels_swapped(agent, monkeypatch):
    forward = agent.vision_backbone.forward
    monkeypatch.setattr(agent.vision_backbone, "forward", lambda p: forward(p.roll(3, 1)))


def mistake_gelu(agent, monkeypatch, tower="fused_featurizer"):
    gelu = F.gelu
    towers = getattr(agent.vision_backbone, tower)
    forward = towers.forward

    def with_tanh(x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "gelu", lambda x: gelu(x, approximate="tanh"))
            return forward(x)

    monkeypatch.setattr(towers, "forward", with_tanh)


def mistake_gelu_dino(agent, monkeypatch):
    mistake_gelu(agent, monkeypatch, "featurizer")


def mistake_layernorm_eps(agent, monkeypatch):
    for module in agent.vision_backbone.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5


def mistake_rms_eps(agent, monkeypatch):
    for module in agent.language_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5


def mistake_positions_restart(agent, monkeypatch):
    """Not in the table: RoPE frequencies lost, as after building on the meta device."""
    agent.language_model["model"].rotary_emb.inv_freq.zero_()


MISTAKES = [  # measured differences: vision, hidden, argmax agreement (golden README), None where that does not say
    (mistake_causal, 0, 3.59, 0.06),
    (mistake_padding_not_masked, 0, 4.23, 0.35),
    (mistake_stop_left_out, 0, 2.92, 0.14),
    (mistake_read_later, 0, 3.65, 0.48),
    (mistake_read_earlier, 0, 4.22, 0.47),
    (mistake_placeholder_embedding, 0, 5.55, 0.0),
    (mistake_channels_swapped, 16.3, 4.91, 0.01),
    (mistake_gelu, 1.8e-3, 1.7e-3, 1.0),
    (mistake_gelu_dino, 7.0e-4, 6.9e-4, 1.0),
    (mistake_layernorm_eps, 2.8e-4, 3.5e-4, 1.0),
    (mistake_rms_eps, 0, 4.2e-3, 0.99),
    (mistake_positions_restart, 0, None, None),
]


@pytest.mark.parametrize(("mistake", "vision", "hidden", "argmax"), MISTAKES, ids=lambda m: getattr(m, "__name__", ""))
def test_parity_notices_mistakes(weights, monkeypatch, mistake, vision, hidden, argmax):
    """Each mistake moves the outputs by what was measured with the reference code, far beyond the limit of 1e-4."""
    agent = golden_agent(weights)
    mistake(agent, monkeypatch)
    diff = difference(agent)
    assert max(diff["vision"], diff["hidden"]) > 2e-4
    assert diff["vision"] == pytest.approx(vision, rel=0.05, abs=1e-4)
    if hidden is not None:
        assert diff["hidden"] == pytest.approx(hidden, rel=0.05)
        assert diff["argmax"] == pytest.approx(argmax, abs=0.006)


@pytest.mark.parametrize(("mistake", "vision", "hidden", "argmax"), [("third block", 6.4, 3.69, 0.28), ("norm", 7.8, 3.22, 0.12)])
def test_parity_notices_the_unused_parts(weights, mistake, vision, hidden, argmax):
    """Running the last block or the final norm of the towers, whose weights every checkpoint has."""
    config = copy.deepcopy(GOLDEN)
    if mistake == "third block":
        config.dino.depth = config.siglip.depth = 4
    agent = golden_agent(weights, config)
    if mistake == "norm":
        for name in ("featurizer", "fused_featurizer"):
            tower, prefix = getattr(agent.vision_backbone, name), f"vision_backbone.{name}.norm."
            norm = [weights[prefix + "weight"], weights[prefix + "bias"]]
            tower.register_forward_hook(lambda m, x, y, norm=norm: F.layer_norm(y, y.shape[-1:], *norm, 1e-6))
    diff = difference(agent)
    assert diff["vision"] == pytest.approx(vision, rel=0.05)
    assert diff["hidden"] == pytest.approx(hidden, rel=0.05)
    assert diff["argmax"] == pytest.approx(argmax, abs=0.006)


def test_parity_notices_swapped_images(weights):
    agent = golden_agent(weights, num_images=2)
    pixels, ids, lengths = inputs(2)
    with torch.no_grad():
        _, hidden = agent(pixels.roll(6, 1), ids, lengths)
    assert np.abs(hidden.numpy() - G["img2_stop_hidden"]).max() == pytest.approx(3.84, rel=0.05)


def test_causal_flag(weights):
    """--attention causal exists for comparison; every sample of every variant differs."""
    for images, stop in VARIANTS:
        agent = golden_agent(weights, num_images=images, append_stop=stop, attention="causal")
        assert difference(agent, images, stop)["hidden"] > 2.8
