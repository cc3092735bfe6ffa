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
    pad_id: int = 32000

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


def tiny_config(vocab_size, image_size=84, hidden=96, layers=3, heads=4, ffn=256, vision=48, depth=3, patch=14):
    """The same architecture in small, for a tokenizer of `vocab_size` words; `depth` blocks per tower run."""
    vocab = vocab_size + 256
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "ffn": ffn, "max_positions": 512}
    ids = {"vocab": vocab, "padded_vocab": 64 * (vocab // 64 + 1), "pad_id": vocab, "blank": 3}
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
    expected = {"vision_backbone_id": "dinosiglip-vit-so-224px", "arch_specifier": "no-align+fused-gelu-mlp"}
    for key, value in (expected | {"n_action_bins": 256}).items():
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
        pad_id=content.get("pad_token_id", 32000),
    )


# -------------------- Tokens and prompts --------------------
def token_to_value(k) -> torch.Tensor:
    """Bin index 0..255 of an action token -> bin centre in (-1, 1); the indices 0 and 1 share the last of 255 centres."""
    return (2 * (255 - torch.as_tensor(k)).clamp(0, 254).double() + 1) / 255 - 1


def value_to_token(x) -> torch.Tensor:
    """Normalised action -> bin index: 256 edges over [-1, 1], the largest value has index 0."""
    return torch.as_tensor(256 - np.digitize(np.clip(np.asarray(x), -1.0, 1.0), np.linspace(-1.0, 1.0, 256)))


def quantiles(stats: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = (torch.tensor(stats[key], dtype=torch.float64) for key in ("q01", "q99"))
    return low, high, torch.tensor(stats.get("mask", [True] * len(low)))


def unnormalize(x, stats: dict) -> torch.Tensor:
    """[-1, 1] -> units of the data set `stats`, by 1 % and 99 % quantiles; the gripper is masked, it stays in [0, 1]."""
    (low, high, mask), x = quantiles(stats["action"]), torch.as_tensor(x, dtype=torch.float64)
    return torch.where(mask, 0.5 * (x + 1) * (high - low + 1e-8) + low, x)


def normalize(a, stats: dict, kind: str = "action") -> torch.Tensor:
    """The inverse of `unnormalize`, clipped to [-1, 1]; kind "proprio" for the 8 numbers of the gripper's pose and opening."""
    (low, high, mask), a = quantiles(stats[kind]), torch.as_tensor(a, dtype=torch.float64)
    return torch.where(mask, (2 * (a - low) / (high - low + 1e-8) - 1).clamp(-1, 1), a)


def encode_prompt(tokenizer, instruction: str, config: PolicyConfig) -> list[int]:
    """Token ids of the prompt: BOS first (by the tokenizer), the blank last."""
    ids = tokenizer.encode(PROMPT.format(instruction.lower())).ids
    if ids[0] != config.bos:
        raise ValueError("tokenizer.json does not put <s> in front of a prompt: take the one of the checkpoint")
    return ids if ids[-1] == config.blank else [*ids, config.blank]


def pad_prompts(prompts: list[list[int]], config: PolicyConfig, width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> (B, L) int64, padded on the right to the longest or to `width`, and lengths (B,)."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    padded = torch.full((len(prompts), max(width, int(lengths.max()))), config.pad_id)
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
        self.prefix_tokens = c.prefix_tokens
        if c.prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
            self.reg_token = nn.Parameter(torch.zeros(1, c.prefix_tokens - 1, c.width))
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth - 1))

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        if self.prefix_tokens:
            x = torch.cat([torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
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

    def __init__(self, config, num_images=1, use_proprio=False, append_stop=True, attention="bidirectional", value_hidden=0):
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
            pad_token_id=config.pad_id,
            attn_implementation="sdpa",  # never flash_attention_2: it takes no mask of this shape and would be causal
        )
        # Of lm_head only the 256 action rows exist, in float32.
        self.language_model = nn.ModuleDict({"model": LlamaModel(llama), "lm_head": nn.Linear(d, config.bins, bias=False)})
        self.value_head = ValueHead(d, value_hidden or d)
        self.proprio_projector = MLP(8, d, d) if use_proprio else None
        self.register_buffer("adv_std_peak", torch.zeros(()))  # of the learning loop, saved with the weights

    def embed(self, pixel_values, prompt_ids, prompt_lengths, proprio=None):
        """-> input embeddings (B, S, d), mask of the real tokens (B, S), start (B,): the position of the last prompt token."""
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

    def layers(self) -> list[nn.Module]:
        """All transformer layers."""
        return [*self.language_model["model"].layers, *(b for tower in self.vision_backbone.children() for b in tower.blocks)]

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


def build_agent(config: PolicyConfig, args, device) -> Agent:
    """Agent with uninitialised trunk weights in args.dtype and fresh float32 heads; nothing is allocated twice."""
    with torch.device("meta"):
        agent = Agent(config, args.num_images, args.use_proprio, args.append_stop, args.attention)
    for trunk in (agent.vision_backbone, agent.projector, agent.language_model["model"]):
        trunk.to(getattr(torch, args.dtype))
    agent.to_empty(device=device)
    # RoPE frequencies are no part of a checkpoint: computed here, they would otherwise be whatever was in memory.
    llama = agent.language_model["model"]
    llama.rotary_emb = LlamaRotaryEmbedding(llama.config).to(device)
    for head in (agent.value_head, agent.proprio_projector):
        for layer in head.children() if head is not None else ():
            layer.reset_parameters()
    agent.adv_std_peak.zero_()
    agent.pad_multiple = 32 if args.cuda else 1  # GPU kernels want aligned masks
    return agent


def init_random(config: PolicyConfig, args, device) -> Agent:
    """Random weights: for the tiny preset, and at full size to measure speed and memory without a checkpoint."""
    agent = build_agent(config, args, device)
    generator = torch.Generator(device).manual_seed(args.seed)
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


# -------------------- What trains --------------------
class LoRALinear(nn.Module):
    """W x + b + (alpha / r) B A x with W, b frozen and A, B float32; "gaussian" start: A ~ N(0, 1 / r^2), B = 0."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        kwargs = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, **kwargs) / rank)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **kwargs))

    def forward(self, x):
        update = F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.scale * update

    def merged(self) -> torch.Tensor:
        return (self.weight.float() + self.scale * self.lora_b @ self.lora_a).to(self.weight.dtype)


class MasterLinear(nn.Module):
    """Linear layer whose float32 weights are cast to the input's type: steps of 1e-5 would vanish in bfloat16 weights."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(base.weight.float())
        self.bias = None if base.bias is None else nn.Parameter(base.bias.float())

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def replace_linear(module: nn.Module, build) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, build(child))
        else:
            replace_linear(child, build)


def add_lora(agent: Agent, rank: int, alpha: float) -> None:
    """LoRA on every linear layer of the trunk; parameter names stay, `lora_a` and `lora_b` join them."""
    for trunk in (agent.vision_backbone, agent.projector, agent.language_model["model"]):
        replace_linear(trunk.requires_grad_(False), lambda layer: LoRALinear(layer, rank, alpha))


def prepare_training(agent: Agent, args) -> None:
    """Freeze what does not train (lora: all but adapters and heads; full: vision and token embeddings), compile, checkpoint.

    Weights in full training are float32 masters. Norm scales in bfloat16 stay frozen: a linear layer follows each of them.
    """
    llama = agent.language_model["model"]
    if args.train == "lora":
        add_lora(agent, args.lora_rank, args.lora_alpha)
    else:
        for trunk in (agent.projector, llama):
            replace_linear(trunk, MasterLinear)
        for name, p in agent.named_parameters():
            frozen = name.startswith("vision_backbone") or "embed_tokens" in name
            p.requires_grad_(p.dtype == torch.float32 and not frozen)
    for layer in agent.layers():
        if args.torch_compile:  # layer by layer: a stack of equal layers is compiled once
            layer.forward = torch.compile(layer.forward)
        if args.gradient_checkpointing:  # outside of the compiled code, or nothing would be compiled
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def parameter_groups(agent: Agent) -> list[dict]:
    """AdamW's groups: what trains of the policy, and the value head."""
    trained = [(name, p) for name, p in agent.named_parameters() if p.requires_grad]
    return [{"params": [p for n, p in trained if n.startswith("value_head") == value]} for value in (False, True)]


def trained_state(agent: Agent) -> dict:
    """Tensors that a checkpoint needs on top of the frozen weights."""
    trained = {name for name, p in agent.named_parameters() if p.requires_grad} | {"adv_std_peak"}
    return {name: value for name, value in agent.state_dict().items() if name in trained}


def load_trained(agent: Agent, state: dict) -> None:
    """Put back what `trained_state` took; ValueError if it comes from other settings."""
    if state.keys() != trained_state(agent).keys():
        raise ValueError("the checkpoint trains other parameters: use its --model, --train, --lora-rank and --use-proprio")
    agent.load_state_dict(state, strict=False)


# -------------------- Checkpoint folders --------------------
def find_folder(name: str) -> Path:
    """A local folder, or the download of a hub id; ValueError for what cannot be used."""
    folder = Path(name)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ValueError(f"--model {name} is neither a folder nor a hub id such as owner/name")
        import huggingface_hub

        try:  # small files first, so that a model without discrete actions is refused before 15 GB are here
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "action_head--*.pt"]))
            if not any(folder.glob("action_head--*.pt")):
                patterns = ["*.json", "*.py", "*.model", "*.safetensors", "proprio_projector--*.pt"]
                huggingface_hub.snapshot_download(name, allow_patterns=patterns)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"--model {name} is no local folder and cannot be downloaded ({reason})") from error
    if any(folder.glob("action_head--*.pt")):
        raise ValueError(f"{name} has an action head for L1 regression or diffusion: RL needs one trained on action tokens")
    return folder


def stored_tensors(folder: Path):
    """Yield key and lazy slice of every tensor of a checkpoint, file by file."""
    index = folder / "model.safetensors.index.json"
    files = {path.name for path in folder.glob("*.safetensors")}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    if not files:
        raise ValueError(f"{folder} has no *.safetensors: --model takes the folder or hub id of an OpenVLA-OFT checkpoint")
    for name in sorted(files):
        with safetensors.safe_open(folder / name, "pt") as file:
            for key in file.keys():
                yield key, file.get_slice(key)


def is_unused(key: str, config: PolicyConfig) -> bool:
    """Tensors of every checkpoint that never enter the forward pass: last block, final norm and pooling of the towers."""
    unused = rf"featurizer\.blocks\.{config.dino.depth - 1}|fused_featurizer\.blocks\.{config.siglip.depth - 1}"
    unused += r"|(fused_)?featurizer\.(norm|attn_pool)"
    return re.match(rf"vision_backbone\.({unused})\.|.*rotary_emb\.inv_freq", key) is not None


def action_rows(key: str, config: PolicyConfig) -> slice:
    """Rows of a stored tensor that the agent has: 256 of lm_head, all of the others."""
    return slice(config.first_action_id, config.vocab) if key == "language_model.lm_head.weight" else slice(None)


@torch.no_grad()
def load_weights(agent: Agent, folder: Path) -> str:
    """Copy a folder's tensors into the agent, one by one; -> a line on what was found. ValueError unless all keys match."""
    heads = ("value_head", "proprio_projector")
    wanted = {key: p for key, p in agent.named_parameters() if not key.startswith(heads)}
    missing, ignored, unexpected = set(wanted), 0, []
    for key, stored in stored_tensors(folder):
        if key in wanted:
            tensor = stored[action_rows(key, agent.config)]
            if tensor.shape != wanted[key].shape:
                raise ValueError(f"{folder}: {key} has shape {tuple(tensor.shape)} instead of {tuple(wanted[key].shape)}")
            wanted[key].copy_(tensor)
            missing.discard(key)
        elif is_unused(key, agent.config):
            ignored += 1
        else:
            unexpected.append(key)
    if missing or unexpected:
        raise ValueError(f"{folder} does not fit: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    return f"{len(wanted)} tensors loaded, {ignored} unused ones left out, 0 missing"


@torch.no_grad()
def merge_adapter(agent: Agent, folder: Path) -> str:
    """Add a peft adapter's alpha / r B A to the weights; layers that never run are left out."""
    adapter = json.loads((folder / "adapter_config.json").read_text())
    if adapter.get("use_dora") or adapter.get("use_rslora") or adapter.get("modules_to_save"):
        raise ValueError(f"{folder}: only plain LoRA adapters are implemented, merge this one with peft first")
    pairs = {}
    for key, stored in stored_tensors(folder):
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"{folder} does not fit: unexpected {key}")
        pairs.setdefault(match[1] + ".weight", {})[match[2]] = stored[:].float().flatten(1)  # flat: one is a convolution's
    parameters = dict(agent.named_parameters())
    unexpected = [key for key in pairs if key not in parameters and not is_unused(key, agent.config)]
    if unexpected:
        raise ValueError(f"{folder} does not fit: unexpected {sorted(unexpected)}")
    for key in pairs.keys() & parameters.keys():
        a, b = pairs[key]["A"], pairs[key]["B"][action_rows(key, agent.config)]
        p = parameters[key]
        p.add_((adapter["lora_alpha"] / adapter["r"] * (b.to(p.device) @ a.to(p.device))).view_as(p).to(p.dtype))
    return f"adapter of {len(pairs)} layers merged"


def load_heads(agent: Agent, folder: Path) -> None:
    """The proprio projector, which is part of the policy, and the value head if this script has trained one."""
    files = sorted(folder.glob("proprio_projector--*.pt"))
    if bool(files) != (agent.proprio_projector is not None):
        raise ValueError(f"{folder} has {len(files)} proprio_projector--*.pt files: use --{'' if files else 'no-'}use-proprio")
    for head, path in ((agent.proprio_projector, files[-1] if files else None), (agent.value_head, folder / "value_head.pt")):
        if path is not None and path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            head.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})


def load_policy(name: str, args, device) -> tuple[Agent, tokenizers.Tokenizer, dict]:
    """Folder or hub id -> agent ready to train as args.train says, tokenizer, norm_stats {data set: {action, proprio}}."""
    folder = base = find_folder(name)
    adapter = next((f for f in (folder, folder / "lora_adapter") if (f / "adapter_config.json").exists()), None)
    if adapter is not None and not any(path.name.startswith("model") for path in folder.glob("*.safetensors")):
        base = find_folder(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    config = config_from_folder(base)
    agent = build_agent(config, args, device)
    report = load_weights(agent, base)
    if base != folder:
        report += ", " + merge_adapter(agent, adapter)
    print(f"{name}: {report}", flush=True)
    load_heads(agent, folder)
    agent.source_folder = str(base)
    norm_stats = json.loads((base / "config.json").read_text()).get("norm_stats") or {}
    if (folder / "dataset_statistics.json").exists():
        norm_stats |= json.loads((folder / "dataset_statistics.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    prepare_training(agent, args)
    return agent, tokenizer, norm_stats


def resolve_unnorm_key(norm_stats: dict, suite: str, key: str = "auto") -> str:
    """Name of the statistics that un-normalise the actions of a suite."""
    candidates = [suite, f"{suite}_no_noops", f"{suite}_no_noops_trajall"] if key == "auto" else [key]
    candidates += list(norm_stats) if key == "auto" and len(norm_stats) == 1 else []
    for candidate in candidates:
        if candidate in norm_stats:
            return candidate
    keys = ", ".join(sorted(norm_stats)) or "none"
    raise ValueError(f"--unnorm-key {key}: no such statistics for {suite}; the checkpoint has {keys}")


def export_tensors(agent: Agent, source: Path | None):
    """Yield the tensors of the public layout: LoRA merged, all rows of lm_head, the source's own where the agent has none."""
    modules, dtype = dict(agent.named_modules()), agent.language_model["model"].embed_tokens.weight.dtype
    own, config = dict(agent.named_parameters()), agent.config
    own = {k: p for k, p in own.items() if not k.startswith(("value_head", "proprio_projector")) and ".lora_" not in k}
    for key, stored in stored_tensors(source) if source else ((key, None) for key in own):
        tensor = own[key].detach() if key in own else stored[:]
        module = modules.get(key.removesuffix(".weight"))
        if isinstance(module, LoRALinear):
            tensor = module.merged().detach()
        if key == "language_model.lm_head.weight":  # float32, so that reading it back gives the same logits
            rows = stored[:].float() if source else torch.zeros(config.padded_vocab, config.hidden)
            rows[action_rows(key, config)] = tensor.cpu()
            yield key, rows
        else:
            yield key, tensor.to("cpu", dtype).contiguous()


def write_shards(folder: Path, tensors) -> None:
    """model-0000i-of-0000n.safetensors and their index."""
    shards, shard, weight_map = [], {}, {}

    def flush():
        shards.append(list(shard))
        safetensors.torch.save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shard.clear()

    total = 0
    for key, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[key] = tensor
        total += tensor.nbytes
    flush()
    for i, keys in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"{i}.part", folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def save_policy(folder, agent: Agent, tokenizer, norm_stats: dict, source_folder=None) -> None:
    """Write a folder that `load_policy` and the public loaders read: the files of the source folder with our weights.

    Beside the public files: value_head.pt, and lora.pt with the unmerged adapters, since merging rounds them to bfloat16.
    """
    folder, source = Path(folder), source_folder or agent.source_folder
    source, config, size = Path(source) if source else None, agent.config, agent.config.image_size
    new = folder.with_name(folder.name + ".tmp")  # renamed when complete
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    content = {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "text_config": {"model_type": "llama", "vocab_size": config.padded_vocab, "pad_token_id": config.pad_id},
        "n_action_bins": config.bins,
        "pad_token_id": config.pad_id,
    }
    normalization = [{"mean": m, "std": s, "inplace": False} for m, s in ((DINO_MEAN, DINO_STD), ([0.5] * 3, [0.5] * 3))]
    processor = {"input_sizes": [[3, size, size]] * 2, "tvf_normalize_params": normalization}
    if source:
        for path in source.iterdir():
            if path.suffix in (".json", ".model", ".py", ".txt") and path.name != "model.safetensors.index.json":
                shutil.copyfile(path, new / path.name)
        content = json.loads((source / "config.json").read_text())
    else:
        (new / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    if config != PolicyConfig():
        content["policy_config"] = dataclasses.asdict(config)
    tokenizer.save(str(new / "tokenizer.json"))
    (new / "config.json").write_text(json.dumps(content | {"norm_stats": norm_stats}, indent=2) + "\n")
    (new / "dataset_statistics.json").write_text(json.dumps(norm_stats, indent=2) + "\n")
    write_shards(new, export_tensors(agent, source))
    torch.save(agent.value_head.state_dict(), new / "value_head.pt")
    if agent.proprio_projector is not None:
        torch.save(agent.proprio_projector.state_dict(), new / "proprio_projector--latest_checkpoint.pt")
    lora = {key: p.detach() for key, p in agent.named_parameters() if ".lora_" in key}
    if lora:
        torch.save({"base": str(source), "lora": lora}, new / "lora.pt")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)


# -------------------- Checks and estimates --------------------
def self_check(agent: Agent, batch: dict, temperature: float = 1.0) -> dict:
    """ValueError if the policy has a known silent fault; `batch` = arguments of the agent. -> the measured effects.

    1. The last action token's input reaches the first action's logits: attention is not causal. 2. The image reaches the
    logits. 3. The same tokens have the same log-probs with and without gradient: the ratio on fresh data is 1.
    """
    with torch.no_grad():
        x, real, start = agent.embed(**batch)
        logits = agent.decode(x, real, start)[0]
        changed, rows = x.clone(), torch.arange(len(x), device=x.device)
        changed[rows, start + agent.config.action_tokens] = x[:, 0]
        backward = (agent.decode(changed, real, start)[0][:, 0] - logits[:, 0]).abs().max() / logits.std()
        black, white = (agent(**{**batch, "pixel_values": torch.full_like(batch["pixel_values"], v)})[0] for v in (-2.0, 2.0))
        image = (black - white).abs().max() / logits.std()
        tokens, old, *_ = agent.get_action_and_logprob(**batch, temperature=temperature)
    new = agent.get_action_and_logprob(**batch, tokens=tokens, temperature=temperature)[1]
    ratio = (new.detach() - old).abs().max()
    result = {"backward_attention": backward.item(), "image_effect": image.item(), "fresh_log_ratio": ratio.item()}
    if (result["backward_attention"] > 1e-4) == agent.causal:
        kind = "causal" if result["backward_attention"] <= 1e-4 else "bidirectional"
        raise ValueError(f"attention is {kind}, against --attention: use the version of transformers in the requirements")
    if not result["image_effect"] > 1e-4:
        raise ValueError("a black and a white image give the same action logits: the policy does not see its images")
    if not result["fresh_log_ratio"] < 1e-2:
        raise ValueError(f"the log ratio on fresh data is {result['fresh_log_ratio']:.3f}, not 0: rollout and update disagree")
    return result


def flops_per_chunk(config: PolicyConfig, num_images: int, seq: int) -> float:
    """Floating-point operations of one forward pass for a sequence of `seq` tokens (7B, one image, 345 tokens: 4.9e12)."""
    total = seq * config.layers * (2 * (4 * config.hidden**2 + 3 * config.hidden * config.ffn) + 4 * seq * config.hidden)
    for c in (config.dino, config.siglip):
        n = config.patches + c.prefix_tokens
        total += num_images * n * (c.depth - 1) * (2 * (4 * c.width**2 + 2 * c.width * c.mlp) + 4 * n * c.width)
    features, d = config.dino.width + config.siglip.width, config.hidden
    total += 2 * num_images * config.patches * (4 * features**2 + 4 * features * d + d**2)
    return float(total + 2 * config.action_tokens * d * config.bins)


def memory_plan(agent: Agent, args, micro_batch: int, prompt_length: int = 36) -> str:
    """One line: weights, optimizer and activations in GiB. Weights are counted, activations estimated per token and layer."""
    config, gib, width = agent.config, 2**30, 2 if args.dtype == "bfloat16" else 4
    seq = agent.prefix + prompt_length + config.action_tokens + agent.append_stop
    weights = sum(p.nbytes for p in agent.parameters())
    trained = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    layer = width * seq * (11 * config.hidden + 3 * config.ffn)  # what the backward pass of one layer keeps
    tokens = [(c, (c.depth - 1) * (config.patches + c.prefix_tokens)) for c in (config.dino, config.siglip)]
    if args.gradient_checkpointing:
        activations = config.layers * width * seq * config.hidden + layer
    else:
        activations = config.layers * layer + args.num_images * width * sum(n * (8 * c.width + 2 * c.mlp) for c, n in tokens)
    parts = {"weights": weights, "gradients and Adam": 12 * trained, f"{micro_batch} chunks": micro_batch * activations}
    text = " + ".join(f"{name} {size / gib:.1f}" for name, size in parts.items())
    tflop = flops_per_chunk(config, args.num_images, seq) / 1e12
    total = sum(parts.values()) / gib
    text += f" = {total:.1f} GiB; {trained / 1e6:.1f} M parameters train"
    return f"memory: {text}; {tflop:.3g} TFLOP per chunk of {seq} tokens"
