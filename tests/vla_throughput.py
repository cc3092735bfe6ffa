"""Measure gipo_vla_libero.py on a GPU: memory, speed against the arithmetic limit, and bfloat16 log-ratios on fresh data.

    python tests/vla_throughput.py --output results/vla_throughput.json                          # LoRA, 7.5 B random weights
    python tests/vla_throughput.py --train full --gradient-checkpointing --output results/vla_throughput.json
    python tests/vla_throughput.py --size tiny --device cpu                                      # the measurement itself
    python tests/vla_throughput.py --save random7b     # 15 GB in the public layout: to try a whole run without a checkpoint

Random weights are as fast as trained ones. For the log-ratios the action head is scaled until the policy is as sure as a
trained one, because flat distributions hide the rounding. Prints JSON; --output FILE also appends it to the list in FILE.
"""

import dataclasses
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gipo_vla_libero as vla

STATISTICS = {key: {"q01": [-1.0] * n, "q99": [1.0] * n} for key, n in (("action", 7), ("proprio", 8))}


@dataclass
class Args:
    size: Literal["7b", "tiny"] = "7b"
    """the public checkpoints' architecture, or the tiny preset's"""
    device: str = "cuda"
    """cuda or cpu"""
    train: Literal["lora", "full"] = "lora"
    """what trains"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass"""
    torch_compile: bool = False
    """compile the layers"""
    num_images: Literal[1, 2] = 1
    """cameras"""
    batches: tuple[int, ...] = (16, 32, 64)
    """chunks per forward pass of a rollout"""
    micro_batch: str = "auto"
    """chunks per forward and backward pass of an update, or auto as in the script"""
    repeats: int = 10
    """passes per measurement, after two that do not count"""
    limit_tflops: float = 780.0
    """arithmetic the GPU can do per second in bfloat16: what the shares refer to"""
    entropy: float = 1.0
    """nats per token of the sharpened policy"""
    output: str | None = None
    """JSON file to extend"""
    save: str | None = None
    """folder: write the random policy there as a checkpoint of libero_spatial, and measure nothing"""


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(function, device, repeats: int) -> float:
    """Mean time of a call, the device's queue emptied before and after; two calls warm up."""
    for _ in range(2):
        function()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def peak_gib(device) -> float | None:
    """Largest allocation since the last call, GiB."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 1)


def sharpen(agent, inputs: dict, entropy: float) -> float:
    """Scale the action head until the mean entropy per token is `entropy` nats, by bisection; -> the entropy reached."""
    head = agent.language_model["lm_head"].weight
    weight, low, high = head.detach().clone(), 0.0, 12.0  # of log2 of the factor
    for _ in range(20):
        middle = (low + high) / 2
        with torch.no_grad():
            head.copy_(weight * 2**middle)
            reached = agent.get_action_and_logprob(**inputs)[2].mean().item()
        low, high = (middle, high) if reached > entropy else (low, middle)
    return reached


def flops_per_chunk(config, num_images: int, seq: int) -> float:
    """Floating-point operations of one forward pass for a sequence of `seq` tokens (7B, one image, 345 tokens: 4.9e12)."""
    total = seq * config.layers * (2 * (4 * config.hidden**2 + 3 * config.hidden * config.ffn) + 4 * seq * config.hidden)
    for c in (config.dino, config.siglip):
        n = config.patches + c.prefix_tokens
        total += num_images * n * (c.depth - 1) * (2 * (4 * c.width**2 + 2 * c.width * c.mlp) + 4 * n * c.width)
    features, d = config.dino.width + config.siglip.width, config.hidden
    total += 2 * num_images * config.patches * (4 * features**2 + 4 * features * d + d**2)
    return float(total + 2 * config.action_tokens * d * config.bins)


def save(args: Args) -> None:
    """Write the random policy to the folder args.save; its actions have the statistics of no data set, -1 to 1."""
    config = vla.PolicyConfig() if args.size == "7b" else vla.tiny_config(64)
    script = vla.Args(cuda=args.device == "cuda", dtype="bfloat16" if args.device == "cuda" else "float32")
    agent = vla.init_random(config, script, torch.device(args.device))
    words = [vla.instruction("libero_spatial", task) for task in range(len(vla.task_names("libero_spatial")))]
    vla.save_policy(args.save, agent, vla.build_word_tokenizer(words), {"libero_spatial": STATISTICS}, script)


def log_ratios(agent, draw, batches, micro_batch: int) -> dict:
    """|l| between sampling in rollout batches and evaluating in pieces of `micro_batch`, with equal weights."""
    differences = []
    for batch in batches:
        inputs = draw(max(batch, micro_batch))
        rows = [slice(i, i + batch) for i in range(0, len(inputs["pixel_values"]), batch)]
        with torch.no_grad():
            parts = [agent.get_action_and_logprob(**{k: v if v is None else v[r] for k, v in inputs.items()}) for r in rows]
        tokens, logprobs = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        for start in range(0, len(tokens), micro_batch):
            piece = slice(start, start + micro_batch)
            again = {k: v if v is None else v[piece] for k, v in inputs.items()}
            logprob = agent.get_action_and_logprob(**again, tokens=tokens[piece])[1]
            logprob = logprob.detach()  # or its graph is alive beside the next piece's
            differences.append((logprob - logprobs[piece]).abs().flatten().float().cpu().numpy())
    differences = np.concatenate(differences)
    return {
        "tokens": len(differences),
        "mean": float(differences.mean()),
        "percentile_99.9": float(np.percentile(differences, 99.9)),
        "max": float(differences.max()),
    }


def measure(args: Args) -> dict:
    """All figures of one setting."""
    device = torch.device(args.device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    kept = {name: getattr(args, name) for name in ("train", "gradient_checkpointing", "torch_compile", "num_images")}
    script = vla.Args(cuda=device.type == "cuda", dtype=dtype, micro_batch=args.micro_batch, jpeg=False, **kept)
    config = vla.PolicyConfig() if args.size == "7b" else vla.tiny_config(64)
    torch.manual_seed(1)
    agent = vla.init_random(config, script, device)
    vla.prepare_training(agent, script)
    for module in agent.modules():
        if isinstance(module, vla.LoRALinear):  # 1 % of the weights, as after some training: while B is 0, they round nothing
            rank, width = module.lora_a.shape
            torch.nn.init.normal_(module.lora_b, std=0.01 * (rank / width) ** 0.5 / module.scale)
    prompts = torch.randint(4, config.vocab - config.bins, (1, 36))
    interface = vla.Interface(prompts, torch.tensor([36]), STATISTICS, config, script, device)
    generator = torch.Generator().manual_seed(1)

    def draw(batch: int) -> dict:  # every chunk another image, of smooth colours rather than noise
        small = torch.randint(0, 256, (batch * args.num_images, 3, 8, 8), generator=generator).float()
        images = torch.nn.functional.interpolate(small, (config.image_size,) * 2, mode="bilinear").byte()
        images = images.view(batch, args.num_images, 3, *[config.image_size] * 2).permute(0, 1, 3, 4, 2)
        return interface.inputs(images.contiguous(), torch.zeros(batch, 8), torch.zeros(batch, dtype=torch.long))

    sequence = agent.prefix + 36 + config.action_tokens + agent.append_stop
    tflop = flops_per_chunk(config, args.num_images, sequence) / 1e12
    result = {"settings": dataclasses.asdict(args), "tflop_per_chunk": tflop, "sequence": sequence}
    result["entropy"] = sharpen(agent, draw(8), args.entropy)
    vla.self_check(agent, draw(2))
    result["memory_weights_gib"] = peak_gib(device)

    result["rollout"] = []
    for batch in args.batches:
        inputs = draw(batch)
        with torch.no_grad():
            seconds = seconds_per_call(lambda given=inputs: agent.get_action_and_logprob(**given), device, args.repeats)
        speed = batch / seconds
        row = {"batch": batch, "chunks_per_second": speed, "share": speed * tflop / args.limit_tflops}
        result["rollout"].append(row | {"memory_gib": peak_gib(device)})

    micro_batch = vla.find_micro_batch(agent, interface, script) if args.micro_batch == "auto" else int(args.micro_batch)
    optimizer = torch.optim.AdamW(vla.optimizer_parameters(agent), lr=1e-6, weight_decay=0.0, fused=script.cuda)
    inputs = draw(micro_batch)
    tokens = agent.get_action_and_logprob(**inputs)[0]
    peak_gib(device)

    def train():
        _, logprob, _, value, _ = agent.get_action_and_logprob(**inputs, tokens=tokens)
        (logprob.mean() + (value**2).mean()).backward()

    def step():
        train()
        optimizer.step()
        optimizer.zero_grad()

    result["log_ratio"] = log_ratios(agent, draw, args.batches, micro_batch)  # before any step
    seconds = seconds_per_call(train, device, args.repeats)
    # Backward costs two forwards, one if weights need no gradient (LoRA); checkpointing adds one. In full training the
    # vision towers are frozen and nothing before them trains: one forward, no more.
    passes, speed = 2 + (args.train == "full") + args.gradient_checkpointing, micro_batch / seconds
    towers = {name: dataclasses.replace(getattr(config, name), depth=1) for name in ("dino", "siglip")}
    vision = tflop - flops_per_chunk(dataclasses.replace(config, **towers), args.num_images, sequence) / 1e12
    per_sample = passes * tflop - (passes - 1) * vision * (args.train == "full")
    row = {"micro_batch": micro_batch, "samples_per_second": speed, "tflop_per_sample": per_sample}
    row["share"] = speed * per_sample / args.limit_tflops
    row["optimizer_step_seconds"] = max(seconds_per_call(step, device, args.repeats) - seconds, 0.0)
    result["update"] = row | {"memory_gib": peak_gib(device)}
    names = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    return result | {"device": name, "versions": names, "commit": vla.git_commit(), "date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: no GPU here; --size tiny --device cpu tries the measurement out", file=sys.stderr)
        sys.exit(2)
    if args.save:
        save(args)
        sys.exit()
    result = measure(args)
    print(json.dumps(result, indent=2))
    if args.output:
        path = Path(args.output)
        path.write_text(json.dumps([*(json.loads(path.read_text()) if path.exists() else []), result], indent=1) + "\n")
