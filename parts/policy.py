import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

PROMPT = "In: What action should the robot take to {}?\nOut:"
# preprocessor_config.json holds these bfloat16-rounded numbers, not the usual 0.485, 0.456, 0.406 / 0.229, 0.224, 0.225.
DINO_MEAN, DINO_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
CROP_SIDE = math.sqrt(0.9)  # 90 % of the area
SHARD_BYTES = 4 * 10**9  # largest file of an exported checkpoint


# -------------------- Policy configuration --------------------
@dataclass
class TowerConfig:
    """One vision transformer. `depth` counts all blocks of the checkpoint; the last one is never run, so it is not built."""

    width: int
    depth: int
    heads: int
    mlp: int
    prefix_tokens: int = 0  # class token and registers in front of the patches
    layerscale: bool = False


@dataclass
class PolicyConfig:
    """All that the architecture needs; the defaults are OpenVLA-OFT 7B."""

    dino: TowerConfig = field(default_factory=lambda: TowerConfig(1024, 24, 16, 4096, 5, True))
    siglip: TowerConfig = field(default_factory=lambda: TowerConfig(1152, 27, 16, 4304))
    image_size: int = 224
    patch: int = 14
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    ffn: int = 11008
    vocab: int = 32000  # the tokenizer's; the last 256 ids are the action tokens
    padded_vocab: int = 32064  # rows of the embedding and of the checkpoint's lm_head
    rope_theta: float = 1e4
    rms_eps: float = 1e-6  # what a checkpoint's config.json leaves at the library's default; Llama-2's own file says 1e-5
    max_positions: int = 2048
    chunk: int = 8
    action_dim: int = 7
    bins: int = 256
    bos: int = 1
    eos: int = 2
    blank: int = 29871  # the lone blank that ends every prompt
    pad: int = 32000

    @property
    def first_action_id(self) -> int:
        return self.vocab - self.bins

    @property
    def action_tokens(self) -> int:
        return self.chunk * self.action_dim

    @property
    def patches(self) -> int:  # of one image
        return (self.image_size // self.patch) ** 2

    @classmethod
    def from_dict(cls, values: dict):
        towers = {name: TowerConfig(**values[name]) for name in ("dino", "siglip")}
        return cls(**{**values, **towers})


def tiny_config(vocab_size, image_size=84, hidden=96, layers=3, heads=4, ffn=256, vision=48, depth=3, patch=14) -> PolicyConfig:
    """The same architecture in small, for a tokenizer of `vocab_size` words; `depth` blocks per tower run."""
    vocab = vocab_size + 256
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "ffn": ffn, "max_positions": 512}
    ids = {"vocab": vocab, "padded_vocab": 64 * (vocab // 64 + 1), "pad": vocab, "blank": 3}
    dino = TowerConfig(vision, depth + 1, 2, 2 * vision, 5, True)
    siglip = TowerConfig(vision, depth + 1, 2, 2 * vision)
    return PolicyConfig(dino, siglip, image_size=image_size, patch=patch, **sizes, **ids)


def config_from_folder(folder) -> PolicyConfig:
    """Read config.json of a public checkpoint, whose text_config omits what equals transformers' defaults, or of our own."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json: --model takes the folder or hub id of an OpenVLA-OFT checkpoint")
    content = json.loads(path.read_text())
    if "policy_config" in content:
        return PolicyConfig.from_dict(content["policy_config"])
    expected = {"vision_backbone_id": "dinosiglip-vit-so-224px", "arch_specifier": "no-align+fused-gelu-mlp", "n_action_bins": 256}
    for key, value in expected.items():
        if content.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {content[key]}, but this script implements {value} only")
    text = {key: value for key, value in content["text_config"].items() if key not in ("torch_dtype", "dtype")}
    llama = LlamaConfig(**text)
    if (llama.num_key_value_heads, llama.tie_word_embeddings) != (llama.num_attention_heads, False):
        raise ValueError(f"{path}: grouped keys or tied embeddings are not implemented")
    return PolicyConfig(
        hidden=llama.hidden_size,
        layers=llama.num_hidden_layers,
        heads=llama.num_attention_heads,
        ffn=llama.intermediate_size,
        vocab=llama.vocab_size - content.get("pad_to_multiple_of", 64),
        padded_vocab=llama.vocab_size,
        rope_theta=text.get("rope_theta", 1e4),
        rms_eps=llama.rms_norm_eps,
        max_positions=llama.max_position_embeddings,
        pad=content.get("pad_token_id", 32000),
    )


# -------------------- Tokens and prompts --------------------
def token_to_value(k) -> np.ndarray:
    """Bin index 0..255 of the 256 action tokens -> bin centre in (-1, 1); the indices 0 and 1 share the last of 255 centres."""
    return (2 * np.clip(255 - np.asarray(k), 0, 254) + 1) / 255 - 1


def value_to_token(x) -> np.ndarray:
    """Normalised action -> bin index: 256 edges over [-1, 1], the largest value has index 0."""
    return 256 - np.digitize(np.clip(np.asarray(x), -1.0, 1.0), np.linspace(-1.0, 1.0, 256))


def stats_arrays(stats: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = np.asarray(stats["q01"]), np.asarray(stats["q99"])
    return low, high, np.asarray(stats.get("mask", [True] * len(low)))


def unnormalize(x, stats: dict) -> np.ndarray:
    """[-1, 1] -> environment units by the 1 % and 99 % quantiles; masked dimensions (the gripper) pass unchanged."""
    low, high, mask = stats_arrays(stats)
    return np.where(mask, 0.5 * (np.asarray(x) + 1) * (high - low + 1e-8) + low, x)


def normalize(a, stats: dict) -> np.ndarray:
    """The inverse of `unnormalize`, clipped to [-1, 1]; also for proprio, whose statistics have no mask."""
    low, high, mask = stats_arrays(stats)
    return np.where(mask, np.clip(2 * (np.asarray(a) - low) / (high - low + 1e-8) - 1, -1, 1), a)


def encode_prompt(tokenizer, instruction: str, config: PolicyConfig) -> list[int]:
    """Token ids of the prompt: BOS first (by the tokenizer), the blank last."""
    ids = tokenizer.encode(PROMPT.format(instruction.lower())).ids
    if ids[0] != config.bos:
        raise ValueError("tokenizer.json does not put <s> in front of a prompt: take the one of the checkpoint")
    return ids if ids[-1] == config.blank else [*ids, config.blank]


def pad_prompts(prompts: list[list[int]], config: PolicyConfig, width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> (B, L) int64, padded on the right to the longest or to `width`, and lengths (B,)."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    padded = torch.full((len(prompts), max(width, int(lengths.max()))), config.pad)
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return padded, lengths


def build_word_tokenizer(instructions) -> tokenizers.Tokenizer:
    """One token per word or punctuation mark of the prompts, <s> in front: what the tiny preset has in place of Llama's."""
    splitter = tokenizers.pre_tokenizers.Whitespace()
    words = {word for text in instructions for word, _ in splitter.pre_tokenize_str(PROMPT.format(text.lower()))}
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "▁", *sorted(words)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


# -------------------- Images --------------------
@functools.cache
def lanczos_matrix(inputs: int, outputs: int) -> np.ndarray:
    """(outputs, inputs) weights of TensorFlow's antialiased lanczos3 resize along one axis."""
    scale = inputs / outputs
    centre = (np.arange(outputs)[:, None] + 0.5) * scale
    x = (np.arange(inputs)[None] + 0.5 - centre) / max(scale, 1.0)
    weights = np.where(np.abs(x) <= 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """Compress and decompress as the training data was. TensorFlow's decoder differs by about one level from Pillow's."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    return np.asarray(Image.open(buffer))


def resize_images(images, config: PolicyConfig, args) -> torch.Tensor:
    """Camera images (B, n, H, W, 3) uint8, already rotated -> (B, n, s, s, 3) uint8: what the replay buffer stores.

    Pillow's own Lanczos rounds between the two axes, which changes a fifth of the bytes; RLinf trained with plain bicubic.
    """
    images, size = np.asarray(images), config.image_size
    *batch, height, width, _ = images.shape
    flat = images.reshape(-1, height, width, 3)
    if args.preprocess == "rlinf":
        x = torch.from_numpy(flat.astype(np.float32)).permute(0, 3, 1, 2)
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    else:
        if args.jpeg:
            flat = np.stack([jpeg_round_trip(image) for image in flat])
        rows = lanczos_matrix(height, size) @ flat.reshape(len(flat), height, -1).astype(np.float32)
        x = torch.from_numpy(lanczos_matrix(width, size) @ rows.reshape(len(flat), size, width, 3))
    return x.round_().clamp_(0, 255).to(torch.uint8).reshape(*batch, size, size, 3)


def crop_images(v: torch.Tensor) -> torch.Tensor:
    """TensorFlow's crop_and_resize of the central 90 % of the area: (..., s, s, 3) float in 0..1 -> the same shape.

    It samples corner-aligned, at o (s - 1) + i sqrt(0.9); cutting out whole pixels is wrong by two levels on average. Index
    and blend instead of a matrix product, which a GPU may compute in TF32, too coarse for the rounding that follows.
    """
    size = v.shape[-2]
    y = (1 - CROP_SIDE) / 2 * (size - 1) + torch.arange(size, device=v.device, dtype=torch.float64) * CROP_SIDE
    low, share = y.floor().long(), (y % 1).float()[:, None]
    high = (low + 1).clamp(max=size - 1)
    v = torch.lerp(v[..., low, :, :], v[..., high, :, :], share[..., None])
    return torch.lerp(v[..., low, :], v[..., high, :], share).clamp(0, 1)


def normalize_images(images: torch.Tensor, args) -> torch.Tensor:
    """(B, n, s, s, 3) uint8 -> (B, 6 n, s, s) float32 on the same device; per image 3 channels for DINOv2, 3 for SigLIP."""
    v = images.float() / 255
    if args.center_crop and args.preprocess == "oft":  # RLinf's pipeline has no crop
        v = torch.floor(crop_images(v) * 255.5) / 255
    mean, std = torch.tensor(DINO_MEAN, device=v.device), torch.tensor(DINO_STD, device=v.device)
    v = torch.cat([(v - mean) / std, (v - 0.5) / 0.5], -1)
    return v.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()


def preprocess(images, config: PolicyConfig, args, device) -> torch.Tensor:
    """Camera images -> pixel values, both steps at once."""
    return normalize_images(resize_images(images, config, args).to(device), args)


# -------------------- Agent --------------------
class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear layers fc1, fc2, ... with exact (erf) GELU between: HF's SigLIP has the tanh approximation, 2e-3 off."""

    def __init__(self, *widths: int):
        super().__init__()
        for i in range(1, len(widths)):
            setattr(self, f"fc{i}", nn.Linear(widths[i - 1], widths[i]))

    def forward(self, x):
        for i, layer in enumerate(self.children()):
            x = layer(F.gelu(x) if i else x)
        return x


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale_factor


class VisionBlock(nn.Module):
    def __init__(self, c: TowerConfig):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.width, eps=1e-6), nn.LayerNorm(c.width, eps=1e-6)
        self.attn, self.mlp = VisionAttention(c.width, c.heads), MLP(c.width, c.mlp, c.width)
        self.ls1, self.ls2 = (LayerScale(c.width) if c.layerscale else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTower(nn.Module):
    """(B, 3, s, s) -> (B, patches, width): the second-to-last block's output, without final norm and prefix tokens."""

    def __init__(self, c: TowerConfig, image_size: int, patch: int):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, c.width, patch, patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2, c.width))  # of the patches only
        self.prefix_tokens, self.gradient_checkpointing = c.prefix_tokens, False
        if c.prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
            self.reg_token = nn.Parameter(torch.zeros(1, c.prefix_tokens - 1, c.width))
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth - 1))

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        if self.prefix_tokens:
            x = torch.cat([torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            recompute = self.gradient_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x[:, self.prefix_tokens :]


class VisionBackbone(nn.Module):
    """(B, 6 n, s, s) -> (B, n patches, DINOv2 width + SigLIP width)."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.featurizer = VisionTower(config.dino, config.image_size, config.patch)
        self.fused_featurizer = VisionTower(config.siglip, config.image_size, config.patch)

    def forward(self, pixel_values):
        images = pixel_values.unflatten(1, (-1, 6)).flatten(0, 1).to(self.featurizer.pos_embed.dtype)
        features = torch.cat([self.featurizer(images[:, :3]), self.fused_featurizer(images[:, 3:])], -1)
        return features.view(len(pixel_values), -1, features.shape[-1])


class ValueHead(nn.Module):
    """AcceRL's critic: attention pool over the action hidden states, then an MLP. Float32, and no gradient to the policy."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.pool, self.norm = nn.Linear(width, 1), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, hidden):
        hidden = hidden.detach().float()
        pooled = (torch.softmax(self.pool(hidden), 1) * hidden).sum(1)
        return self.fc2(F.relu(self.fc1(self.norm(pooled)))).squeeze(-1)


class Agent(nn.Module):
    """OpenVLA-OFT with discrete actions and a value head; state-dict keys are those of the public checkpoints.

    Sequence: [BOS] patches (proprio) prompt[1:] 56 zero vectors [</s>] padding. All 56 action tokens come from one forward
    pass: each is read one position early, the first at the last prompt token. Attention is bidirectional over everything,
    also the text; a stock causal Llama runs without an error and drops from 97 % success to 50 %.
    """

    def __init__(self, config, num_images=1, use_proprio=False, append_stop=True, attention="bidirectional", value_hidden=None):
        super().__init__()
        self.config, self.append_stop, self.causal = config, append_stop, attention == "causal"
        self.prefix = num_images * config.patches + use_proprio  # tokens between BOS and the rest of the prompt
        self.pad_multiple = 1  # sequence lengths are rounded up to a multiple of it: 32 for static, aligned shapes
        self.source_folder = None  # where the weights came from
        d, features = config.hidden, config.dino.width + config.siglip.width
        self.vision_backbone = VisionBackbone(config)
        self.projector = MLP(features, 4 * features, d, d)
        llama = LlamaConfig(
            vocab_size=config.padded_vocab,
            hidden_size=d,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            rms_norm_eps=config.rms_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_positions,
            pad_token_id=config.pad,
            attn_implementation="sdpa",  # never flash_attention_2: it takes no mask of this shape and would be causal
        )
        # Of lm_head only the 256 action rows exist, in float32.
        self.language_model = nn.ModuleDict({"model": LlamaModel(llama), "lm_head": nn.Linear(d, config.bins, bias=False)})
        self.value_head = ValueHead(d, value_hidden or d)
        self.proprio_projector = MLP(8, d, d) if use_proprio else None

    def embed(self, pixel_values, prompt_ids, prompt_lengths, proprio=None):
        """-> input embeddings (B, S, d), mask of the real tokens (B, S), and start (B,): the position of the last prompt token."""
        embed_tokens = self.language_model["model"].embed_tokens
        text, patches = embed_tokens(prompt_ids), self.projector(self.vision_backbone(pixel_values))
        if self.proprio_projector is not None:
            weight = self.proprio_projector.fc1.weight
            token = self.proprio_projector(proprio.to(weight.dtype)).unsqueeze(1).to(patches.dtype)
            patches = torch.cat([patches, token], 1)
        front = torch.cat([text[:, :1], patches, text[:, 1:]], 1)
        length = front.shape[1] + self.config.action_tokens + self.append_stop
        length = math.ceil(length / self.pad_multiple) * self.pad_multiple
        position = torch.arange(length, device=front.device).unsqueeze(0)
        start = self.prefix + prompt_lengths - 1
        end = (start + 1 + self.config.action_tokens).unsqueeze(1)  # of the action tokens
        # The placeholders of the action tokens are zero vectors, whatever their id; padding is masked, so it may be zero too.
        x = F.pad(front, (0, 0, 0, length - front.shape[1])) * (position <= start.unsqueeze(1)).unsqueeze(-1)
        if self.append_stop:
            stop = embed_tokens.weight[self.config.eos]
            x = torch.where((position == end).unsqueeze(-1), stop, x)
        return x, position < end + self.append_stop, start

    def decode(self, embeddings, real, start):
        """Embeddings, mask and start of `embed` -> logits (B, 56, 256) float32, hidden states (B, 56, d)."""
        # A 4-D bool mask is taken as it is. Without one transformers turns causal, and is_causal=False is not reliable.
        mask = real[:, None, None, :]
        if self.causal:
            mask = mask & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
        out = self.language_model["model"](inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
        index = start.unsqueeze(1) + torch.arange(self.config.action_tokens, device=start.device)
        hidden = out.last_hidden_state.gather(1, index.unsqueeze(-1).expand(-1, -1, self.config.hidden))
        return self.language_model["lm_head"](hidden.float()), hidden

    def forward(self, pixel_values, prompt_ids, prompt_lengths, proprio=None):
        """(B, 6 n, s, s), right-padded ids (B, L), (B,), (B, 8) or None -> raw logits (B, 56, 256), hidden (B, 56, d)."""
        return self.decode(*self.embed(pixel_values, prompt_ids, prompt_lengths, proprio))

    def get_value(self, hidden: torch.Tensor) -> torch.Tensor:
        """V(s) from the detached hidden states of the action tokens: (B, 56, d) -> (B,)."""
        return self.value_head(hidden)

    def get_action_and_logprob(
        self, pixel_values, prompt_ids, prompt_lengths, proprio=None, tokens=None, deterministic=False, temperature=1.0
    ):
        """Sample a chunk of action tokens, or take one.

        -> tokens (B, chunk, 7) int64 in 0..255, their log-probs and the entropies, both float32 of the tempered distribution
        and of the same shape, value (B,), raw logits (B, 56, 256).
        """
        logits, hidden = self(pixel_values, prompt_ids, prompt_lengths, proprio)
        logprobs = torch.log_softmax(logits / temperature, -1)
        shape = (len(logits), self.config.chunk, self.config.action_dim)
        if tokens is None and deterministic:
            tokens = logits.argmax(-1).view(shape)
        elif tokens is None:
            tokens = torch.multinomial(logprobs.detach().exp().flatten(0, 1), 1).view(shape)
        chosen = logprobs.gather(-1, tokens.view(len(logits), -1, 1)).view(shape)
        entropy = -(logprobs.exp() * logprobs).sum(-1).view(shape)
        return tokens, chosen, entropy, self.get_value(hidden), logits


def build_agent(config: PolicyConfig, args, device, dtype) -> Agent:
    """Agent with uninitialised trunk weights in `dtype` and fresh float32 heads; nothing is allocated twice."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        agent = Agent(config, args.num_images, args.use_proprio, args.append_stop, args.attention)
    for trunk in (agent.vision_backbone, agent.projector, agent.language_model["model"]):
        trunk.to(dtype)
    agent.to_empty(device=device)
    # RoPE frequencies are no part of a checkpoint: computed here, they would otherwise be whatever was in memory.
    llama = agent.language_model["model"]
    llama.rotary_emb = LlamaRotaryEmbedding(llama.config).to(device)
    for head in (agent.value_head, agent.proprio_projector):
        for layer in head.children() if head is not None else ():
            layer.reset_parameters()
    return agent


def init_random(config: PolicyConfig, seed: int, device, dtype, args) -> Agent:
    """Random weights: for the tiny preset, and at full size to measure speed and memory without a checkpoint."""
    agent = build_agent(config, args, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in agent.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim == 1:  # norms and layer scales
            nn.init.ones_(p)
        else:
            fan_in = p[0].numel() if p.ndim != 3 else 1  # 3: class token, registers, position embedding
            std = 0.5 if p.ndim == 3 or "embed_tokens" in name else fan_in**-0.5
            nn.init.normal_(p, std=0.1 * std if "lm_head" in name else std, generator=generator)
    return agent
