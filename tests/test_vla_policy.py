"""The policy of gipo_vla_libero.py: parity with the public OpenVLA-OFT code on a tiny configuration (tests/data), its files.

openvla_tiny.npz holds outputs of that code; weights, images and prompts are regenerated here by the rule it was made with.
Every parity test has its negative controls: the mistakes that users of other code bases have lost days to must be noticed.
"""

import copy
import dataclasses
import fnmatch
import json
import math
import re
import shutil
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
    vla.TowerConfig(32, 3, 2, 64, 5, True), vla.TowerConfig(48, 3, 2, 96), image_size=28, hidden=64, layers=2, heads=4,
    ffn=128, vocab=512, padded_vocab=576, pad_id=512, blank=3,
)  # fmt: skip


def make_args(**changes):
    """The arguments the policy reads; a small LoRA."""
    defaults = {
        "suite": "libero_spatial", "unnorm_key": "auto", "num_images": 1, "use_proprio": False, "append_stop": True,
        "preprocess": "oft", "jpeg": False, "center_crop": True, "temperature": 1.0,
        "train": "lora", "lora_rank": 4, "lora_alpha": 2, "gradient_checkpointing": False, "dtype": "float32",
        "torch_compile": False, "cuda": False, "seed": 1, "evaluate": None, "model": "", "revision": "", "base": "",
        "camera_size": 256, "reflections": True, "noop_steps": 10, "noop_gripper": -1.0, "tasks": (), "max_steps": 0,
        "fast_env": False, "micro_batch": "auto", "train_init_states": 50,
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
    assert all(key.startswith(("value_head", "adv_std_peak")) for key in missing)
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
    np.testing.assert_allclose(vla.unnormalize(values, {"action": STATS}), G[name + "_actions"], atol=1e-6)
    # One at a time and padded to a multiple of 32 must not matter.
    agent.pad_multiple = 32
    for i, ids in enumerate(prompts()):
        with torch.no_grad():
            _, hidden = agent(pixel_values(images)[i : i + 1], *vla.pad_prompts([ids], GOLDEN))
        assert np.abs(hidden[0].numpy() - G[name + "_hidden"][i]).max() < 1e-4


def mistake_causal(agent, monkeypatch):
    """As a library does that makes the mask causal."""
    forward = agent.language_model["model"].forward

    def causal(attention_mask, **kwargs):
        length = attention_mask.shape[-1]
        return forward(attention_mask=attention_mask & torch.ones(length, length, dtype=torch.bool).tril(), **kwargs)

    monkeypatch.setattr(agent.language_model["model"], "forward", causal)


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
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = 1e-5


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


UNUSED = [("third block", 6.4, 3.69, 0.28), ("norm", 7.8, 3.22, 0.12)]


@pytest.mark.parametrize(("mistake", "vision", "hidden", "argmax"), UNUSED)
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


# -------------------- Images --------------------
def golden_resized(image=None, **changes):
    """The golden camera image, rotated as the environment does, after resizing: (224, 224, 3) uint8."""
    image = camera_image()[::-1, ::-1] if image is None else image
    return vla.resize_images(image[None, None].copy(), vla.PolicyConfig(), make_args(**changes))


def test_preprocessing_equals_the_reference():
    assert zlib.crc32(camera_image().tobytes()) == int(G["test_image_crc32"])
    resized = golden_resized()
    assert resized.shape == (1, 1, 224, 224, 3) and resized.dtype == torch.uint8
    rows, columns = G["pre_lanczos_pixels"].T
    assert (resized[0, 0].numpy()[rows, columns] == G["pre_lanczos_u8"]).all()
    assert np.abs(resized[0, 0].numpy().sum((0, 1), dtype=np.int64) - G["pre_lanczos_channel_sum"]).max() <= 50
    matrix = vla.lanczos_matrix(256, 224)
    exact = np.einsum("ia,jb,abc->ijc", matrix, matrix, camera_image()[::-1, ::-1].astype(np.float64), optimize=True)
    assert np.abs(exact[rows, columns] - G["pre_lanczos_float"]).max() < 1e-2
    v = vla.crop_images(resized.float() / 255)
    rows, columns = G["pre_crop_pixels"].T
    assert np.abs(v[0, 0].numpy()[rows, columns] - G["pre_crop_float"]).max() < 1e-4
    cropped = torch.floor(v * 255.5)[0, 0].numpy()
    assert (cropped[rows, columns] == G["pre_crop_u8"]).all()
    assert np.abs(cropped.sum((0, 1), dtype=np.float64) - G["pre_crop_channel_sum"]).max() <= 50
    pixels = vla.normalize_images(resized, make_args())
    assert pixels.shape == (1, 6, 224, 224) and pixels.dtype == torch.float32
    rows, columns = G["pre_norm_pixels"].T
    assert np.abs(pixels[0].numpy()[:, rows, columns].T - G["pre_norm_values"]).max() < 1e-5
    images = vla.resize_images(camera_image()[::-1, ::-1][None, None].copy(), vla.PolicyConfig(), make_args())
    whole = vla.normalize_images(images, make_args())
    assert torch.equal(whole, pixels)


def test_preprocessing_notices_mistakes():
    """The same comparison with the usual shortcuts: shares of unequal values as measured (golden README)."""
    from PIL import Image

    rows, columns = G["pre_lanczos_pixels"].T

    def unequal(resized):
        return (np.asarray(resized)[rows, columns] != G["pre_lanczos_u8"]).mean()

    rotated = np.ascontiguousarray(camera_image()[::-1, ::-1])
    assert unequal(golden_resized(camera_image())[0, 0]) > 0.98
    assert unequal(golden_resized(camera_image()[::-1])[0, 0]) > 0.98
    assert unequal(golden_resized(preprocess="rlinf")[0, 0]) > 0.4  # bicubic
    assert unequal(Image.fromarray(rotated).resize((224, 224), Image.LANCZOS)) == pytest.approx(0.24, abs=0.03)

    rows, columns = G["pre_crop_pixels"].T
    resized = golden_resized()
    crop = vla.crop_images(resized.float() / 255)[0, 0]
    assert ((crop * 255).round().numpy()[rows, columns] != G["pre_crop_u8"]).mean() == pytest.approx(0.24, abs=0.03)
    naive = Image.fromarray(resized[0, 0].numpy()).crop((5, 5, 218, 218)).resize((224, 224), Image.BILINEAR)
    assert (np.asarray(naive)[rows, columns] != G["pre_crop_u8"]).mean() > 0.9
    rows, columns = G["pre_norm_pixels"].T
    usual = (crop * 255.5).floor() / 255
    usual = (usual - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert np.abs(usual.numpy()[rows, columns] - G["pre_norm_values"][:, :3]).max() == pytest.approx(0.008, abs=0.002)


def test_preprocessing_variants():
    """JPEG changes the image a little; sizes that fit pass unchanged; two images keep their order; RLinf has no crop."""
    plain, jpeg = golden_resized().int(), golden_resized(jpeg=True).int()
    assert 0.1 < (plain - jpeg).abs().float().mean() < 12
    assert 0 < vla.jpeg_round_trip(np.full((16, 16, 3), 77, np.uint8)).mean() < 80
    small = np.random.default_rng(0).integers(0, 256, (2, 2, 28, 28, 3), dtype=np.uint8)
    args = make_args(center_crop=False)
    assert torch.equal(vla.resize_images(small, GOLDEN, args), torch.from_numpy(small))
    pixels = vla.normalize_images(torch.from_numpy(small), args)
    assert pixels.shape == (2, 12, 28, 28)
    for n in range(2):
        siglip = (pixels[:, 6 * n + 3 : 6 * n + 6] * 0.5 + 0.5) * 255
        np.testing.assert_allclose(siglip.permute(0, 2, 3, 1).numpy(), small[:, n], atol=1e-3)
    without = vla.normalize_images(torch.from_numpy(small), make_args(preprocess="rlinf"))
    assert torch.equal(without, pixels)
    constant = vla.resize_images(np.full((1, 1, 40, 50, 3), 200, np.uint8), GOLDEN, args)  # not square, and smaller than 2x
    assert (constant == 200).all()
    assert (vla.resize_images(np.full((1, 1, 20, 20, 3), 9, np.uint8), GOLDEN, args) == 9).all()  # enlarging


# -------------------- Tokens and prompts --------------------
def test_action_tokens():
    """Bin values as the reference has them; in Llama's vocabulary id 31999 is the smallest, 31745 and 31744 the largest."""
    np.testing.assert_allclose(vla.token_to_value(np.arange(256)), G["bin_value_by_index"], atol=1e-12)
    by_id = {31744 + k: float(vla.token_to_value(k)) for k in (0, 1, 255)}
    assert by_id[31999] == pytest.approx(-0.99608, abs=1e-5)
    assert by_id[31745] == by_id[31744] == pytest.approx(0.99608, abs=1e-5)
    k = np.arange(1, 256)
    assert (vla.value_to_token(vla.token_to_value(k)).numpy() == k).all()
    edges = np.linspace(-1, 1, 256)
    a = np.random.default_rng(0).uniform(-1.2, 1.2, 2000)
    ids = 32000 - np.digitize(np.clip(a, -1, 1), edges)  # as section 1.4 of the checkpoint's tokenizer states
    assert (vla.value_to_token(a).numpy() == ids - 31744).all()
    assert vla.value_to_token(torch.tensor([1.0, -1.0])).tolist() == [0, 255]


def test_action_units():
    stats = {"action": {"q01": [-0.5, 0.0], "q99": [0.5, 2.0], "mask": [True, False]}, "proprio": {"q01": [0.0], "q99": [4.0]}}
    x = np.array([[0.3, 0.9], [-1.0, 0.1]])
    a = vla.unnormalize(x, stats).numpy()
    np.testing.assert_allclose(a, [[0.15, 0.9], [-0.5, 0.1]], atol=1e-6)
    np.testing.assert_allclose(vla.normalize(a, stats), x, atol=1e-6)
    np.testing.assert_allclose(vla.normalize([[3.0, 7.0]], stats), [[1.0, 7.0]])  # clipped, and the gripper left alone
    np.testing.assert_allclose(vla.normalize([[1.0]], stats, "proprio"), [[-0.5]], atol=1e-6)


def test_prompts():
    tokenizer = vla.build_word_tokenizer(["Put the Bowl on the plate", "open the drawer"])
    config = vla.tiny_config(tokenizer.get_vocab_size())
    ids = vla.encode_prompt(tokenizer, "put the BOWL on the plate", config)
    words = [tokenizer.id_to_token(i) for i in ids]
    assert words == "<s> In : What action should the robot take to put the bowl on the plate ? Out : ▁".split()
    assert max(ids) < config.first_action_id and config.vocab < config.padded_vocab and config.padded_vocab % 64 == 0
    again = vla.tokenizers.Tokenizer.from_str(tokenizer.to_str())
    assert vla.encode_prompt(again, "open the drawer", config) == vla.encode_prompt(tokenizer, "open the drawer", config)
    assert vla.encode_prompt(tokenizer, "open the fridge", config)[12] == 0  # unknown word
    padded, lengths = vla.pad_prompts([[1, 5, 3], [1, 3]], config)
    assert padded.tolist() == [[1, 5, 3], [1, 3, config.pad_id]] and lengths.tolist() == [3, 2]
    ends_with_blank = SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[1, 13, 29871]))
    assert vla.encode_prompt(ends_with_blank, "x", vla.PolicyConfig()) == [1, 13, 29871]  # not appended twice
    with pytest.raises(ValueError, match="<s>"):
        vla.encode_prompt(SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[13])), "x", vla.PolicyConfig())


# -------------------- Sampling, value, precision --------------------
def test_sampling_and_temperature(weights):
    agent = golden_agent(weights)
    torch.manual_seed(0)
    tokens, logprobs, entropy, value, logits = agent.get_action_and_logprob(*inputs(), temperature=1.6)
    assert tokens.shape == logprobs.shape == entropy.shape == (3, 8, 7)
    assert value.shape == (3,) and logits.shape == (3, 56, 256)
    assert tokens.dtype == torch.int64 and logprobs.dtype == entropy.dtype == value.dtype == logits.dtype == torch.float32
    reference = torch.distributions.Categorical(logits=logits / 1.6)
    torch.testing.assert_close(logprobs.flatten(1), reference.log_prob(tokens.flatten(1)))
    torch.testing.assert_close(entropy.flatten(1), reference.entropy())
    again = agent.get_action_and_logprob(*inputs(), tokens=tokens, temperature=1.6)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], logprobs)
    greedy = agent.get_action_and_logprob(*inputs(), deterministic=True, temperature=1.6)[0]
    assert torch.equal(greedy.flatten(1), logits.argmax(-1))
    hot = agent.get_action_and_logprob(*inputs(), temperature=100.0)
    assert hot[2].mean() > 0.999 * math.log(256) > again[2].mean()
    # Sampling follows the probabilities: the mean log-prob over many draws is minus the entropy.
    draws = torch.stack([agent.get_action_and_logprob(*inputs())[1] for _ in range(40)])
    assert draws.mean().item() == pytest.approx(-agent.get_action_and_logprob(*inputs())[2].mean().item(), abs=0.1)


def test_value_gradient_does_not_reach_the_trunk(weights):
    agent = golden_agent(weights)
    agent.get_action_and_logprob(*inputs())[3].sum().backward()
    assert {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None} == {"value_head"}


def test_proprio_token(weights):
    torch.manual_seed(0)
    agent = golden_agent(weights)
    with_token = vla.Agent(GOLDEN, use_proprio=True)
    with_token.load_state_dict(agent.state_dict(), strict=False)
    x, real, start = with_token.embed(*inputs(), torch.randn(3, 8))
    plain, _, plain_start = agent.embed(*inputs())
    assert (start - plain_start == 1).all() and (real.sum(1) == plain_start + 59).all()
    torch.testing.assert_close(torch.cat([x[:, :5], x[:, 6:]], 1), plain)  # right after the 4 patches
    assert not torch.equal(with_token(*inputs(), torch.zeros(3, 8))[0], with_token(*inputs(), torch.ones(3, 8))[0])


def test_bfloat16_trunk_has_float32_heads():
    args = make_args(dtype="bfloat16")
    agent = vla.init_random(GOLDEN, args, "cpu")
    vla.prepare_training(agent, args)
    assert {p.dtype for n, p in agent.named_parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in agent.parameters() if p.requires_grad} == {torch.float32}
    assert agent.language_model["model"].rotary_emb.inv_freq.dtype == torch.float32
    _, logprobs, entropy, value, logits = agent.get_action_and_logprob(*inputs())
    assert {t.dtype for t in (logprobs, entropy, value, logits)} == {torch.float32}
    (logprobs.mean() + value.mean()).backward()
    assert {p.grad.dtype for p in agent.parameters() if p.requires_grad} == {torch.float32}
    same = vla.init_random(GOLDEN, make_args(dtype="float32"), "cpu")
    for (name, p), q in zip(same.named_parameters(), vla.init_random(GOLDEN, args, "cpu").parameters(), strict=True):
        p.data.copy_(q.data) if not name.startswith("value_head") else None
    assert (same(*inputs())[0] - vla.init_random(GOLDEN, args, "cpu")(*inputs())[0]).abs().max() < 0.05


def test_init_random_is_reproducible():
    a, b, c = (vla.init_random(GOLDEN, make_args(seed=seed), "cpu").state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(torch.isfinite(value).all() for value in a.values())
    assert not torch.equal(a["projector.fc1.weight"], c["projector.fc1.weight"])


# -------------------- Training modes --------------------
def test_lora_starts_as_the_identity_and_merges(weights):
    agent, args = golden_agent(weights), make_args()
    before = agent(*inputs())[0]
    torch.manual_seed(0)
    vla.prepare_training(agent, args)
    assert torch.equal(agent(*inputs())[0], before)
    layers = {n: m for n, m in agent.named_modules() if isinstance(m, vla.LoRALinear)}
    assert len(layers) == 2 * 2 * 4 + 3 + 2 * 7  # all linear layers of towers, projector and Llama
    a = torch.cat([m.lora_a.flatten() for m in layers.values()])
    assert a.std().item() == pytest.approx(1 / args.lora_rank, rel=0.05)
    names = {n for n, p in agent.named_parameters() if p.requires_grad}
    assert all(n.startswith("value_head") or ".lora_" in n or n == "language_model.lm_head.weight" for n in names)
    _, logprobs, _, value, _ = agent.get_action_and_logprob(*inputs())
    (logprobs.mean() + value.mean()).backward()
    assert {n for n, p in agent.named_parameters() if p.grad is not None} == names
    policy, critic = vla.optimizer_parameters(agent)
    assert len(policy["params"]) + len(critic["params"]) == len(names)
    assert {id(p) for p in critic["params"]} == {id(p) for p in agent.value_head.parameters()}

    for layer in layers.values():
        layer.lora_b.data.normal_(std=0.02)
    after = agent(*inputs())[0]
    assert (after - before).abs().max() > 0.1
    merged = golden_agent(weights)
    for name, layer in layers.items():
        merged.get_submodule(name).weight.data.copy_(layer.merged())
    assert (merged(*inputs())[0] - after).abs().max() < 1e-5 * after.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_training(dtype):
    args = make_args(train="full", dtype=dtype)
    agent = vla.init_random(GOLDEN, args, "cpu")
    before = agent(*inputs())[0]
    vla.prepare_training(agent, args)
    assert torch.equal(agent(*inputs())[0], before)  # float32 masters of bfloat16 weights compute the same
    trained = {n for n, p in agent.named_parameters() if p.requires_grad}
    assert not any(n.startswith("vision_backbone") or "embed_tokens" in n for n in trained)
    assert all(p.dtype == torch.float32 for p in agent.parameters() if p.requires_grad)
    assert sum(n.endswith("proj.weight") for n in trained) == 14 and "projector.fc1.bias" in trained
    assert any("norm" in n for n in trained if "language_model" in n) == (dtype == "float32")
    _, logprobs, _, value, _ = agent.get_action_and_logprob(*inputs())
    (logprobs.mean() + value.mean()).backward()
    assert {n for n, p in agent.named_parameters() if p.grad is not None} == trained
    with torch.no_grad():  # steps of 1e-5 accumulate, which they cannot in bfloat16 weights
        layer = agent.language_model["model"].layers[0].mlp.up_proj
        start = layer.weight.clone()
        for _ in range(10):
            layer.weight += 1e-5
        assert ((layer.weight - start) > 5e-5).all()


@pytest.mark.parametrize("train", ["lora", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(weights, train):
    gradients = []
    for checkpointing in (False, True):
        agent = golden_agent(weights)
        torch.manual_seed(0)
        vla.prepare_training(agent, make_args(train=train, gradient_checkpointing=checkpointing))
        for m in agent.modules():
            if isinstance(m, vla.LoRALinear):
                m.lora_b.data.normal_(std=0.02)
        calls = []
        for layer in (agent.language_model["model"].layers[0], agent.vision_backbone.featurizer.blocks[0]):
            next(layer.children()).register_forward_hook(lambda *a, calls=calls: calls.append(1))
        tokens = torch.arange(3 * 56).view(3, 8, 7)
        agent.get_action_and_logprob(*inputs(), tokens=tokens)[1].mean().backward()
        assert len(calls) == 2 + checkpointing * (2 if train == "lora" else 1)  # nothing to recompute in a frozen tower
        gradients.append({n: p.grad for n, p in agent.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def optimizer_of(agent):
    return torch.optim.AdamW(vla.optimizer_parameters(agent), lr=1e-3)


def test_training_state(weights, tmp_path):
    agents = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        agent = golden_agent(weights)
        vla.prepare_training(agent, make_args())
        for p in agent.parameters():
            if p.requires_grad:
                p.data.add_(0.01 * torch.randn_like(p))
        agents.append(agent)
    state = vla.training_state(agents[0], optimizer_of(agents[0]))  # without a step yet: the trained weights alone
    assert sum(v.numel() for v in state.values()) < 0.5 * sum(p.numel() for p in agents[0].parameters())
    assert not torch.equal(agents[0](*inputs())[0], agents[1](*inputs())[0])
    vla.dcp.save(vla.training_state(agents[0], optimizer_of(agents[0])), checkpoint_id=tmp_path / "weights", no_dist=True)
    vla.load_training_state(tmp_path / "weights", agents[1], optimizer_of(agents[1]))
    for a, b in zip(*(agent.get_action_and_logprob(*inputs(), deterministic=True) for agent in agents), strict=True):
        assert torch.equal(a, b)
    other = golden_agent(weights)
    with pytest.raises(vla.ArgumentError, match="--lora-rank"):
        vla.load_training_state(tmp_path / "weights", other, optimizer_of(other))


# -------------------- Self-check --------------------
def check_batch(images=1):
    return dict(zip(("pixel_values", "prompt_ids", "prompt_lengths"), inputs(images), strict=True))


def test_self_check(weights, monkeypatch):
    result = vla.self_check(golden_agent(weights), check_batch(), temperature=1.6)
    assert result["backward_attention"] > 0.01 and result["image_effect"] > 0.01 and result["fresh_log_ratio"] < 1e-5
    agent = golden_agent(weights)
    mistake_causal(agent, monkeypatch)
    with pytest.raises(ValueError, match="attention is causal"):
        vla.self_check(agent, check_batch())

    agent = golden_agent(weights)  # one that drops the image tokens
    embed = agent.embed

    def blind(*args, **kwargs):
        x, real, start = embed(*args, **kwargs)
        return x, real & (torch.arange(x.shape[1]) - 1 >= 4), start

    monkeypatch.setattr(agent, "embed", blind)
    with pytest.raises(ValueError, match="does not see"):
        vla.self_check(agent, check_batch())

    agent = golden_agent(weights)  # one whose training pass differs, as dropout would make it
    decode = agent.decode
    monkeypatch.setattr(agent, "decode", lambda *a: (decode(*a)[0] * (1.1 if torch.is_grad_enabled() else 1), decode(*a)[1]))
    with pytest.raises(ValueError, match="fresh data"):
        vla.self_check(agent, check_batch())


def test_compiled_layers_round_alike_with_and_without_gradient():
    """--torch-compile in bfloat16: rollout and update agree bit for bit; the gradients are the eager ones but for rounding."""
    tokens, gradients = torch.randint(256, (3, 8, 7)), []
    for compiled in (False, True):
        torch.manual_seed(1)
        args = make_args(dtype="bfloat16", torch_compile=compiled)
        agent = vla.init_random(GOLDEN, args, torch.device("cpu"))
        vla.prepare_training(agent, args)
        for name, p in agent.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(p, std=0.1)
        with torch.no_grad():
            old = agent.get_action_and_logprob(**check_batch(), tokens=tokens)[1]
        new = agent.get_action_and_logprob(**check_batch(), tokens=tokens)[1]
        assert torch.equal(old, new)
        new.mean().backward()
        gradients.append({name: p.grad for name, p in agent.named_parameters() if "lora_" in name})
    assert len(gradients[1]) == 2 * (2 * 7 + 2 * 2 * 4 + 3)  # every linear layer of decoder, towers and projector
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() < 0.2 * expected.norm(), name


# -------------------- Checkpoint folders --------------------
PUBLIC_CONFIG = {  # config.json of a public OpenVLA-OFT checkpoint, as far as it concerns the architecture
    "model_type": "openvla", "arch_specifier": "no-align+fused-gelu-mlp", "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_sizes": [224, 224], "llm_backbone_id": "llama2-7b-pure", "n_action_bins": 256, "pad_to_multiple_of": 64,
    "pad_token_id": 32000, "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}  # fmt: skip
DATA = {"action": STATS, "proprio": {"q01": [0.0] * 8, "q99": [1.0] * 8}}


def write_checkpoint(folder, weights, change=None, config=GOLDEN):
    """A folder as on the hub: all 130 tensors in three shards with an index, and the files beside them."""
    folder.mkdir()
    weights = dict(weights)
    if change:
        change(weights)
    keys, weight_map = sorted(weights), {}
    for i in range(3):
        name = f"model-0000{i + 1}-of-00003.safetensors"
        weight_map |= dict.fromkeys(keys[i::3], name)
        save_file({key: weights[key] for key in keys[i::3]}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    content = PUBLIC_CONFIG | {"policy_config": vla.dataclasses.asdict(config), "norm_stats": {"bridge": DATA}}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "dataset_statistics.json").write_text(json.dumps({"libero_spatial_no_noops": DATA}))
    (folder / "preprocessor_config.json").write_text('{"kept": true}')
    (folder / "modeling_prismatic.py").write_text("raise RuntimeError('never run')")
    vla.build_word_tokenizer(["pick up the bowl"]).save(str(folder / "tokenizer.json"))
    return str(folder)


def test_public_config_is_the_default(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC_CONFIG))
    assert vla.config_from_folder(tmp_path) == vla.PolicyConfig()
    with torch.device("meta"):
        agent = vla.Agent(vla.PolicyConfig())
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in agent.named_children()}
    assert count["projector"] == 71_385_600
    # The published totals less what never runs (final norms, last blocks, attention pool) and all but 256 rows of lm_head.
    block = {"dino": 12 * 1024**2 + 15 * 1024, "siglip": 4 * 1152**2 + 2 * 1152 * 4304 + 4304 + 9 * 1152}
    pool = 4 * 1152**2 + 2 * 1152 * 4304 + 4304 + 8 * 1152
    dino, siglip = 303_230_976 - block["dino"] - 2 * 1024, 427_680_704 - block["siglip"] - 2 * 1152 - pool
    tower = agent.vision_backbone.featurizer, agent.vision_backbone.fused_featurizer
    assert [sum(p.numel() for p in t.parameters()) for t in tower] == [dino, siglip]
    assert count["language_model"] == 6_738_939_904 - (32064 - 256) * 4096
    for key, value in (("vision_backbone_id", "siglip-only"), ("n_action_bins", 512)):
        (tmp_path / "config.json").write_text(json.dumps(PUBLIC_CONFIG | {key: value}))
        with pytest.raises(ValueError, match=key):
            vla.config_from_folder(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_load_save_reload(weights, tmp_path, capsys, train, dtype):
    """Public folder -> same logits; train a little, save -> same logits and all public tensors; the value head comes along."""
    args = make_args(train=train, dtype=dtype)
    agent, tokenizer, norm_stats = vla.load_policy(write_checkpoint(tmp_path / "public", weights), args, "cpu")
    assert "87 tensors loaded, 43 unused ones left out, 0 missing" in capsys.readouterr().out
    if dtype == "float32":
        assert difference(agent)["hidden"] < 1e-4
        assert torch.equal(agent(*inputs())[0], golden_agent(weights)(*inputs())[0])
    assert norm_stats.keys() == {"libero_spatial_no_noops"}  # config.json's may be of an earlier training
    assert vla.encode_prompt(tokenizer, "pick up the bowl", GOLDEN)[0] == 1
    torch.manual_seed(0)
    for p in agent.parameters():
        if p.requires_grad:
            p.data.add_(0.02 * torch.randn_like(p))
    before = agent.get_action_and_logprob(*inputs(), deterministic=True)
    vla.save_policy(tmp_path / "saved", agent, tokenizer, norm_stats, args)
    assert (tmp_path / "saved" / "lora.pt").exists() == (train == "lora")
    again, _, stats = vla.load_policy(str(tmp_path / "saved"), args, "cpu")
    assert stats == norm_stats
    after = again.get_action_and_logprob(*inputs(), deterministic=True)
    scale = before[4].abs().max()
    assert torch.equal(after[4], before[4]) and torch.equal(after[3], before[3])
    if train == "lora":  # the shards alone are for other loaders: rounded
        (tmp_path / "saved" / "lora.pt").rename(tmp_path / "lora.pt")
        merged = vla.load_policy(str(tmp_path / "saved"), args, "cpu")[0](*inputs())[0]
        assert (merged - before[4]).abs().max() < (0.3 if dtype == "bfloat16" else 1e-5) * scale
        (tmp_path / "lora.pt").rename(tmp_path / "saved" / "lora.pt")
    assert not torch.equal(before[4], golden_agent(weights)(*inputs())[0])
    # The folder holds every public tensor, also those without a use here, and the files beside them.
    saved = {key: value for path in (tmp_path / "saved").glob("*.safetensors") for key, value in load_file(path).items()}
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in weights.items()}
    unused = [key for key, used in zip(G["weight_keys"].tolist(), G["weight_used"], strict=True) if not used]
    for key in [*unused, "language_model.model.embed_tokens.weight"]:
        torch.testing.assert_close(saved[key].float(), weights[key], rtol=0.01, atol=0.01)
    head = saved["language_model.lm_head.weight"]
    assert torch.equal(head[:256], weights["language_model.lm_head.weight"][:256])
    assert torch.equal(head[256:512], agent.language_model["lm_head"].weight)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"preprocessor_config.json", "modeling_prismatic.py", "tokenizer.json", "dataset_statistics.json"} <= names
    assert "kept" in (tmp_path / "saved" / "preprocessor_config.json").read_text() and not (tmp_path / "saved.tmp").exists()
    vla.save_policy(tmp_path / "saved", again, tokenizer, norm_stats, args)  # over the folder it came from
    assert torch.equal(vla.load_policy(str(tmp_path / "saved"), args, "cpu")[0](*inputs())[0], after[4])


def test_small_adapters_survive_saving(weights, tmp_path, capsys):
    """An early adapter moves most weights by less than half a step of bfloat16: merged it would all but vanish."""
    args = make_args(dtype="bfloat16")
    base, _, _ = vla.load_policy(write_checkpoint(tmp_path / "public", weights), args, "cpu")
    agent, tokenizer, norm_stats = vla.load_policy(str(tmp_path / "public"), args, "cpu")
    layers = [module for module in agent.modules() if isinstance(module, vla.LoRALinear)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            layer.lora_b.normal_(std=3e-4, generator=generator)
            layer.lora_a.normal_(std=0.25, generator=generator)
        agent.language_model["lm_head"].weight += 1e-3
    vla.save_policy(tmp_path / "saved", agent, tokenizer, norm_stats, args)
    merged = [module.merged() for module in layers]
    changed = np.mean([(m != layer.weight).float().mean().item() for m, layer in zip(merged, layers, strict=True)])
    assert changed < 0.5  # what a merged folder would keep of them
    again, _, _ = vla.load_policy(str(tmp_path / "saved"), args, "cpu")
    assert "unmerged" in capsys.readouterr().out
    for (name, p), (_, q), (_, r) in zip(*(a.named_parameters() for a in (agent, again, base)), strict=True):
        assert torch.equal(p, q), name
        assert name.startswith("value_head") or torch.equal(p, r) != (".lora_" in name or "lm_head" in name), name
    # Full training goes on from the sum in float32; other ranks cannot.
    full, _, _ = vla.load_policy(str(tmp_path / "saved"), make_args(dtype="bfloat16", train="full"), "cpu")
    masters = dict(full.named_parameters())
    for name, layer in agent.named_modules():
        if isinstance(layer, vla.LoRALinear) and name.startswith("language_model"):
            expected = layer.weight.float() + layer.scale * layer.lora_b @ layer.lora_a
            torch.testing.assert_close(masters[name + ".weight"].data, expected, rtol=0, atol=1e-7)
    for flags, words in (({"lora_rank": 8}, "give --lora-rank 4"), ({"lora_alpha": 4}, "give --lora-alpha 2")):
        with pytest.raises(ValueError, match=words):
            vla.load_policy(str(tmp_path / "saved"), make_args(dtype="bfloat16", **flags), "cpu")
    for shard in (tmp_path / "public").glob("*.safetensors"):  # as a download that has only begun
        shard.unlink()
    vla.load_policy(str(tmp_path / "saved"), args, "cpu")
    assert "is gone or has other weights now: its adapters stay merged" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "public")
    vla.load_policy(str(tmp_path / "saved"), args, "cpu")
    assert "is gone or has other weights now: its adapters stay merged" in capsys.readouterr().out


def test_adapters_trained_on_a_peft_adapter(weights, tmp_path):
    """They sit on the base with the peft adapter merged, not on the bare base."""
    base, folder = write_checkpoint(tmp_path / "base", weights), tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 2, "lora_alpha": 1}))
    (folder / "dataset_statistics.json").write_text(json.dumps({"libero_spatial": DATA}))
    w, layer = weights["projector.fc1.weight"], "base_model.model.projector.fc1"
    pair = {f"{layer}.lora_A.weight": torch.ones(2, w.shape[1]), f"{layer}.lora_B.weight": torch.ones(w.shape[0], 2)}
    save_file(pair, folder / "adapter_model.safetensors")
    agent, tokenizer, norm_stats = vla.load_policy(str(folder), make_args(), "cpu")
    for p in agent.parameters():
        if p.requires_grad:
            p.data += 0.01
    vla.save_policy(tmp_path / "saved", agent, tokenizer, norm_stats, make_args())
    again, _, _ = vla.load_policy(str(tmp_path / "saved"), make_args(), "cpu")
    assert all(torch.equal(p, q) for p, q in zip(agent.parameters(), again.parameters(), strict=True))


def test_save_without_a_source(tmp_path, monkeypatch):
    """The tiny preset: random weights, own tokenizer, proprio; several shards; the folder is a valid --model."""
    tokenizer = vla.build_word_tokenizer(["open the drawer"])
    config = vla.tiny_config(tokenizer.get_vocab_size(), image_size=28, hidden=32, layers=2, vision=32)
    args = make_args(use_proprio=True, train="full")
    agent = vla.init_random(config, args, "cpu")
    monkeypatch.setattr(vla, "SHARD_BYTES", 200_000)
    monkeypatch.setitem(vla.save_policy.__globals__, "SHARD_BYTES", 200_000)
    vla.save_policy(tmp_path / "tiny", agent, tokenizer, {"libero_spatial": DATA}, args)
    assert len(list((tmp_path / "tiny").glob("model-*.safetensors"))) > 1
    again, tokenizer, stats = vla.load_policy(str(tmp_path / "tiny"), args, "cpu")
    assert again.config == config and stats == {"libero_spatial": DATA}
    prompt = vla.pad_prompts([vla.encode_prompt(tokenizer, "open the drawer", config)], config)
    batch = (torch.randn(1, 6, 28, 28), *prompt, torch.randn(1, 8))
    for a, b in zip(*(x.get_action_and_logprob(*batch, deterministic=True) for x in (agent, again)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="--use-proprio"):
        vla.load_policy(str(tmp_path / "tiny"), make_args(use_proprio=False), "cpu")
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["policy_config"] == dataclasses.asdict(config)


def remove_key(weights):
    del weights["projector.fc2.bias"]


def add_key(weights):
    weights["projector.fc4.bias"] = torch.zeros(3)


def wrong_shape(weights):
    weights["projector.fc2.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_key, r"missing \['projector.fc2.bias'\], unexpected \[\]"),
        (add_key, r"missing \[\], unexpected \['projector.fc4.bias'\]"),
        (wrong_shape, r"projector.fc2.bias has shape \(3,\) instead of \(64,\)"),
    ],
)
def test_keys_must_match(weights, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        vla.load_policy(write_checkpoint(tmp_path / "x", weights, change), make_args(), "cpu")


def test_the_value_head_of_another_algorithm_is_left_out(weights, tmp_path, capsys):
    """RLinf writes one into the checkpoints of its PPO."""

    def add_head(weights):
        weights["value_head.mlp.0.weight"] = torch.zeros(3)

    for name, change in (("with", add_head), ("without", lambda weights: None)):
        vla.load_policy(write_checkpoint(tmp_path / name, weights, change), make_args(), "cpu")
    counts = re.findall(r"(\d+) tensors loaded, (\d+) unused ones left out, 0 missing", capsys.readouterr().out)
    assert [tuple(map(int, count)) for count in counts] == [(87, 44), (87, 43)]


def test_folders_that_cannot_be_used(weights, tmp_path, monkeypatch):
    folder = Path(write_checkpoint(tmp_path / "l1", weights))
    (folder / "action_head--150000_checkpoint.pt").touch()
    with pytest.raises(ValueError, match="L1 regression or diffusion"):
        vla.load_policy(str(folder), make_args(), "cpu")
    (folder / "action_head--150000_checkpoint.pt").rename(folder / "vision_backbone--150000_checkpoint.pt")
    with pytest.raises(ValueError, match="has vision towers with FiLM"):
        vla.load_policy(str(folder), make_args(), "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config"):
        vla.load_policy(str(tmp_path / "empty"), make_args(), "cpu")
    content = {"policy_config": vla.dataclasses.asdict(GOLDEN), "norm_stats": {"libero_spatial": DATA}}
    (tmp_path / "empty" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="safetensors"):
        vla.load_policy(str(tmp_path / "empty"), make_args(), "cpu")
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        vla.load_policy(str(tmp_path / "not" / "there"), make_args(), "cpu")
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"owner/name .*cannot be downloaded \(OSError: no route to host\)$"):
        vla.load_policy("owner/name", make_args(), "cpu")


def test_hub_id(weights, tmp_path, monkeypatch):
    """Small files first; weights only if there is no action head among them, and the statistics are there."""
    import huggingface_hub

    folder, asked = write_checkpoint(tmp_path / "hub", weights), []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda n, **k: asked.append(k) or folder)
    assert difference(vla.load_policy("owner/name", make_args(revision="v2"), "cpu")[0])["hidden"] < 1e-4
    assert ["*.safetensors" in request["allow_patterns"] for request in asked] == [False, False, True]
    assert {request["revision"] for request in asked} == {"v2"}
    wanted = ["proprio_projector--latest_checkpoint.pt", "value_head.pt", "lora.pt"]  # and no state of an optimizer
    files = [file for file in [*wanted, "optimizer.pt"] if any(map(fnmatch.fnmatch, [file] * 99, asked[-1]["allow_patterns"]))]
    assert files == wanted
    asked.clear()
    with pytest.raises(ValueError, match="--unnorm-key libero_10: no such statistics"):
        vla.load_policy("owner/name", make_args(unnorm_key="libero_10"), "cpu")
    assert len(asked) == 1  # before the weights
    (Path(folder) / "action_head--1.pt").touch()
    asked.clear()
    with pytest.raises(ValueError, match="action tokens"):
        vla.load_policy("owner/name", make_args(), "cpu")
    assert len(asked) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_adapter_folder(weights, tmp_path, nested):
    """A peft adapter on its base equals the base with the product added, also on lm_head and the patch convolution."""
    base, folder = write_checkpoint(tmp_path / "base", weights), tmp_path / "adapter"
    adapter = folder / "lora_adapter" if nested else folder
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 2, "lora_alpha": 1}))
    (folder / "dataset_statistics.json").write_text(json.dumps({"libero_goal": DATA}))
    patch, last = "vision_backbone.featurizer.patch_embed.proj", "vision_backbone.featurizer.blocks.2.mlp.fc1"
    layers = ["language_model.model.layers.0.mlp.up_proj", "language_model.lm_head", "projector.fc1", patch, last]
    tensors, merged, generator = {}, dict(weights), torch.Generator().manual_seed(0)
    for layer in layers:
        w = weights[layer + ".weight"]
        a = torch.randn(2, *w.shape[1:], generator=generator)
        b = 0.1 * torch.randn(w.shape[0], 2, *[1] * (w.dim() - 2), generator=generator)
        tensors |= {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b}
        merged[layer + ".weight"] = w + 0.5 * torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).view_as(w)
    save_file(tensors, adapter / "adapter_model.safetensors")
    agent, _, stats = vla.load_policy(str(folder), make_args(), "cpu")
    assert stats.keys() == {"libero_goal"}
    (folder / "dataset_statistics.json").rename(tmp_path / "dataset_statistics.json")
    assert vla.read_statistics(folder, Path(base)).keys() == {"libero_spatial_no_noops"}
    (Path(base) / "dataset_statistics.json").unlink()
    assert vla.read_statistics(folder, Path(base)).keys() == {"bridge"}
    (tmp_path / "dataset_statistics.json").rename(folder / "dataset_statistics.json")
    torch.testing.assert_close(agent(*inputs())[0], golden_agent(merged)(*inputs())[0])
    tensors["base_model.model.projector.fc9.lora_A.weight"] = torch.zeros(2, 2)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="fc9"):
        vla.load_policy(str(folder), make_args(), "cpu")
    config = {"base_model_name_or_path": base, "r": 2, "lora_alpha": 1, "alpha_pattern": {"fc1": 8}}  # another scale per layer
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="only plain LoRA"):
        vla.load_policy(str(folder), make_args(), "cpu")


def test_unnorm_key():
    def key(names, suite="libero_spatial", chosen="auto"):
        return vla.resolve_unnorm_key(dict.fromkeys(names), suite, chosen)

    assert key(["bridge", "libero_spatial", "libero_spatial_no_noops"]) == "libero_spatial"
    assert key(["bridge", "libero_spatial_no_noops"]) == "libero_spatial_no_noops"
    assert key(["x", "libero_90_no_noops_trajall"], "libero_90") == "libero_90_no_noops_trajall"
    for every in ("libero_130_no_noops_trajall", "libero_130_no_noops"):
        assert key(["x", every]) == every  # of all 130 tasks
    assert key(["a", "b"], chosen="b") == "b"
    for names, chosen in ((["a", "b"], "auto"), (["a"], "b")):
        with pytest.raises(ValueError, match="unnorm-key"):
            key(names, chosen=chosen)
    with pytest.raises(
        ValueError, match=r"no dataset_statistics.json .* copy the file from the checkpoint that it was trained"
    ):
        key([])


# -------------------- Estimates --------------------
def test_memory_plan():
    """The arithmetic of the 7B model: 14 GiB of weights, 2.0 GiB per chunk, and copies of the masters in full training."""
    plan = vla.memory_plan(vla.PolicyConfig(), make_args(dtype="bfloat16", lora_rank=32, lora_alpha=16), 24)
    assert plan["weights"] == pytest.approx(14.1, abs=0.3) and plan["24 chunks"] == pytest.approx(48.5, abs=0.5), plan
    assert "masters in bfloat16" not in plan
    plan = vla.memory_plan(vla.PolicyConfig(), make_args(dtype="bfloat16", gradient_checkpointing=True), 24)
    assert plan["24 chunks"] == pytest.approx(3.5, abs=0.5), plan
    full = make_args(dtype="bfloat16", train="full")  # 6.5 billion weights train: their copies, kept for the backward pass
    assert vla.memory_plan(vla.PolicyConfig(), full, 1)["masters in bfloat16"] == pytest.approx(12.3, abs=0.4)
    few = make_args(dtype="bfloat16", train="full", gradient_checkpointing=True)
    assert "masters in bfloat16" not in vla.memory_plan(vla.PolicyConfig(), few, 1)
