"""popo_countdown.py --model: a tiny, randomly initialised Qwen2 and a tokenizer, saved to a folder and loaded by its name."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import differences, read_json, read_pt, read_scalars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3Config, Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import popo_countdown as popo

CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
SHORT = {"num_prompts": 4, "group_size": 3, "updates_per_iteration": 2, "eval_episodes": 6, "eval_samples": 2}
SHORT |= {
    "total_timesteps": 24,
    "max_new_tokens": 6,
    "prompt": "chat",
    "learning_rate": 1e-3,
    "method": "popo",
    "eval_every": 12,
}


def save_model(folder, chat_template):
    """Bytes as tokens, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=chat_template)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = Qwen2Config(vocab_size=len(fast), num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("qwen2"), CHAT)


def arguments(model, run_dir, **values):
    own = {"env_id": "countdown-34", "model": model, "run_dir": str(run_dir), "max_number": 99}
    return popo.with_defaults(popo.Args(**SHORT | own | values))


def test_prompts_are_chat_turns_padded_on_the_left(model, tmp_path):
    task, _ = popo.make_task_and_policy(arguments(model, tmp_path))
    torch.manual_seed(1)
    problems = task.problems(12, test=False)
    tokens, mask = task.prompts(problems)
    assert len(set(mask.sum(1).tolist())) > 2
    for row, kept, numbers, target in zip(tokens, mask, problems["numbers"], problems["target"], strict=True):
        assert kept[-1] and torch.equal(kept, kept.sort().values)
        text = task.tokenizer.decode(row[kept])
        assert text.startswith("<|user|>Using each of the numbers") and text.endswith("<|assistant|>")
        assert str([n for n in numbers.tolist() if n]) in text and f"equals {target}." in text


def test_base_models_without_a_chat_template_get_plain_text(tmp_path, capsys):
    task, _ = popo.make_task_and_policy(arguments(save_model(tmp_path, None), tmp_path))
    tokens, mask = task.prompts(task.problems(2, test=False))
    assert task.tokenizer.decode(tokens[0][mask[0]]).startswith("Using each of the numbers")
    assert capsys.readouterr().out == f"--model {tmp_path} has no chat template: it is asked in plain text\n"


@pytest.mark.parametrize("prompt", ["chat", "few-shot"])
def test_a_chat_template_that_fails_is_left_out(prompt, tmp_path, capsys):
    """As that of a translation model, which wants other turns than a question and an answer."""
    refusing = "{{ raise_exception('a system turn is needed') }}"
    task, _ = popo.make_task_and_policy(arguments(save_model(tmp_path, refusing), tmp_path, prompt=prompt))
    tokens, mask = task.prompts(task.problems(1, test=False))
    assert task.tokenizer.decode(tokens[0][mask[0]]).startswith("Using" if prompt == "chat" else "use 3 5 2")
    assert f"the chat template of --model {tmp_path} is left out, it fails: a system turn is nee" in capsys.readouterr().out


@pytest.mark.parametrize("date", ["date_string if date_string is defined else strftime_now('%d')", "strftime_now('%d %b %Y')"])
def test_a_template_that_writes_the_date_writes_always_the_same(date, tmp_path):
    """As Llama 3.2's and SmolLM3's do, or a run that is resumed on another day would have other prompts."""
    dated = "{{ " + date + " }}" + CHAT
    task, _ = popo.make_task_and_policy(arguments(save_model(tmp_path, dated), tmp_path))
    tokens, mask = task.prompts(task.problems(1, test=False))
    assert task.tokenizer.decode(tokens[0][mask[0]]).startswith("26 Jul 2024<|user|>")


def test_a_turn_ends_where_the_template_ends_it(tmp_path):
    """A base model may have another end token than its chat template, such as Qwen2.5's; plain words after a turn end none."""
    task, _ = popo.make_task_and_policy(arguments(save_model(tmp_path / "a", CHAT), tmp_path))
    assert task.tokenizer.convert_ids_to_tokens(sorted(task.eos)) == ["<|end|>"]
    for i, (closing, more) in enumerate([("<|user|>\n", ["<|user|>"]), ("done", []), (" <|user|>", [])]):
        template = CHAT.replace("{% endfor %}", closing + "{% endfor %}")
        task, _ = popo.make_task_and_policy(arguments(save_model(tmp_path / str(i), template), tmp_path))
        assert task.tokenizer.convert_ids_to_tokens(sorted(task.eos)) == ["<|end|>", *more]


def test_the_context_of_a_model_that_sees_images_is_known(tmp_path):
    """Gemma 3's limit is that of its language part."""
    model = SimpleNamespace(config=Gemma3Config(text_config={"max_position_embeddings": 300}))
    args = arguments("gemma", tmp_path)
    popo.refuse_too_long(model, torch.zeros(1, 294), args)
    with pytest.raises(ValueError, match="more than the 300 that --model gemma reads"):
        popo.refuse_too_long(model, torch.zeros(1, 295), args)


def test_sampling_casts_the_weights_once(model, tmp_path):
    """Not again for every token: in bfloat16 that would take longer than the products."""
    casts, shapes = [], [[32, 32], [16, 32], [64, 32], [32, 64], [259, 32]]  # of the 15 matrices
    for tokens in (2, 12):
        args = arguments(model, tmp_path, dtype="bfloat16", max_new_tokens=tokens)
        task, policy = popo.make_task_and_policy(args)
        with torch.profiler.profile(record_shapes=True) as profile:
            popo.answer(policy, task, args, task.problems(1, test=False), 2, 1.0)
        copies = [event for event in profile.events() if event.name == "aten::_to_copy"]
        casts.append(sum(event.input_shapes[0] in shapes for event in copies))
    assert casts == [15, 15]


def test_a_model_that_cannot_share_a_prompt_is_refused(model, tmp_path):
    """Some of its layers keep a state instead of keys and values."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 259}
    config = Lfm2Config(num_key_value_heads=2, layer_types=["conv", "full_attention"], **sizes)
    shutil.copytree(model, tmp_path / "lfm2")
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "lfm2")
    with pytest.raises(ValueError, match=r"lfm2 cannot share a prompt .*choose a plain transformer"):
        popo.main(arguments(str(tmp_path / "lfm2"), tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_answers_that_the_model_cannot_read_are_refused(tmp_path):
    """Beyond its context GPT-2 has no position, and others no training."""
    folder = save_model(tmp_path / "model", CHAT)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 300}))
    task, _ = popo.make_task_and_policy(arguments(folder, tmp_path, max_new_tokens=20))
    longest = task.prompts(task.problems(64, True, torch.Generator().manual_seed(0)))[0].shape[1]
    popo.make_task_and_policy(arguments(folder, tmp_path, max_new_tokens=300 - longest))
    words = f"--max-new-tokens {301 - longest} with prompts of {longest} tokens is more than the 300 that --model .* reads"
    with pytest.raises(popo.ArgumentError, match=words):
        popo.main(arguments(folder, tmp_path / "runs", max_new_tokens=301 - longest))
    assert not (tmp_path / "runs").exists()


def test_few_shot_prompt_and_answer(model, tmp_path):
    """Solved examples, none of them a held-out problem; the answer is the first line, whatever follows."""
    task, _ = popo.make_task_and_policy(arguments(model, tmp_path, prompt="few-shot"))
    problems = {"numbers": torch.tensor([[20, 3, 7, 0]]), "target": torch.tensor([81])}
    tokens, mask = task.prompts(problems)
    assert task.text(tokens[0][mask[0]]) == "\n".join((*popo.EXAMPLES[3], "use 20 3 7 to make 81:"))
    for text, verdict in ((" (20 + 7) * 3\nuse 1 2 to make 3: 1 + 2", True), ("<answer>(20 + 7) * 3</answer>", False)):
        row = torch.tensor(task.tokenizer(text)["input_ids"])[None, None]
        assert task.rewards(problems, row, torch.ones_like(row, dtype=torch.bool))[0].item() == verdict
    for examples in popo.EXAMPLES.values():
        for line in examples:
            problem, expression = line.split(": ")
            numbers, target = problem.removeprefix("use ").split(" to make ")
            numbers = [int(n) for n in numbers.split()]
            assert popo.verify_infix(numbers, int(target), expression) == (True, True)
            for width in (3, 4) if len(numbers) == 3 else (len(numbers),):  # in countdown-34 a key has four numbers
                row = torch.tensor([numbers + [0] * (width - len(numbers))])
                assert not popo.held_out(popo.problem_keys(row, torch.tensor([int(target)])))


def test_shared_prefix_equals_one_pass_per_answer(model, tmp_path):
    """One pass over each prompt instead of k: log-probs, and gradients as far as the prompt."""
    args = arguments(model, tmp_path, max_new_tokens=8)
    task, policy = popo.make_task_and_policy(args)
    torch.manual_seed(5)
    batch = popo.stack_groups(popo.generate_groups(policy, task, args, 1), "cpu")
    k, length, calls = args.group_size, 8, []
    handle = policy.model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    batch["mask"][:] = True
    shared, _ = popo.response_logprobs(policy, batch, 1.0)
    handle.remove()
    assert calls == [batch["prompts"].shape, (4 * k, length - 1)]
    tokens = torch.cat([batch["prompts"].repeat_interleave(k, 0), batch["responses"].flatten(0, 1)], 1)[:, :-1]
    mask = torch.nn.functional.pad(batch["prompt_mask"].repeat_interleave(k, 0), (0, length - 1), value=True)
    plain = policy.call(tokens, mask, use_cache=False, logits_to_keep=length).logits.unflatten(0, (-1, k)).log_softmax(-1)
    plain = plain.gather(-1, batch["responses"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(shared, plain, atol=1e-4, rtol=0)
    ours, theirs = (torch.autograd.grad(x.sum(), list(policy.parameters())) for x in (shared, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def test_share_cut_off_and_messages(model, tmp_path):
    """An answer is cut off if it reaches the limit without an end token; what to do where nothing can be learned."""
    args = arguments(model, tmp_path, max_new_tokens=3, group_size=50, num_prompts=2)
    task, policy = popo.make_task_and_policy(args)
    with torch.no_grad():
        policy.model.lm_head.weight[task.eos[0]] *= 3
    problems = task.problems(2, test=False)
    found = popo.answer(policy, task, args, problems, 50, 1.0)
    last = found["responses"].gather(-1, found["mask"].sum(-1, keepdim=True) - 1).squeeze(-1)
    assert torch.equal(found["cut_off"], last != task.eos[0]) and 0 < found["cut_off"].float().mean() < 1
    zero = torch.zeros(4, 16)
    assert popo.why_nothing_is_learned(zero, args).startswith(
        "all 64 answers scored 0: nothing to learn from; try --prompt few-shot"
    )
    few_shot = popo.why_nothing_is_learned(zero, dataclasses.replace(args, prompt="few-shot"))
    assert few_shot.endswith("nothing to learn from; try --format-reward 0.1, or an easier task")
    rewarded = dataclasses.replace(args, prompt="few-shot", format_reward=0.1)
    assert popo.why_nothing_is_learned(zero, rewarded).endswith("nothing to learn from; try an easier task")
    assert "all 64 answers were right" in popo.why_nothing_is_learned(zero + 1, args)
    assert "larger --group-size" in popo.why_nothing_is_learned(zero + torch.tensor([0, 1, 0, 1])[:, None], args)


def test_a_run_without_any_success_says_so(model, tmp_path, capsys):
    popo.main(arguments(model, tmp_path, eval_episodes=0))
    out = capsys.readouterr().out
    assert out.count("all 12 answers scored 0: nothing to learn from; try --prompt few-shot or a larger --max-new") == 1
    assert out.count("<|user|>") == 0 and "[0]" in out  # sample answers


def test_kl_penalty_to_the_start_policy(model, tmp_path, monkeypatch):
    """It is 0 in the first update, positive later, and a large weight keeps the policy near the start."""
    monkeypatch.setattr(popo.TextCountdown, "rewards", some_reward)
    distances = []
    for weight in (1e-9, 10.0):
        run = tmp_path / str(weight)
        popo.main(arguments(model, run, kl_coef=weight, total_timesteps=120, eval_every=0, eval_episodes=0))
        (folder,) = run.iterdir()
        kl = [value for _, value in read_scalars(folder)["losses/reference_kl"]]
        assert all(value >= 0 for value in kl) and kl[0] < kl[-1]
        distances.append(kl[-1])
    assert distances[1] < 0.5 * distances[0]


def test_export(model, tmp_path, monkeypatch, capsys):
    """What --export writes, from_pretrained and --model read: the same weights and tokenizer."""
    monkeypatch.setattr(popo.TextCountdown, "rewards", some_reward)
    popo.main(arguments(model, tmp_path / "runs"))
    (folder,) = (tmp_path / "runs").iterdir()
    flags = ["--evaluate", str(folder / "model.pt"), "--eval-episodes", "0", "--export", str(tmp_path / "exported")]
    assert popo.main(popo.parse_args(flags))["episodes"] == 0
    weights = {f"model.{k}": v for k, v in Qwen2ForCausalLM.from_pretrained(tmp_path / "exported").state_dict().items()}
    assert differences(weights, read_pt(folder / "model.pt")["model"]) == []
    task, _ = popo.make_task_and_policy(arguments(str(tmp_path / "exported"), tmp_path))
    assert task.tokenizer.decode(task.tokenizer("1 + 2")["input_ids"]) == "1 + 2"
    with pytest.raises(popo.ArgumentError, match=r"--export .*exported exists: name a new folder"):
        popo.main(popo.parse_args(flags))
    (printed,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("export: "))
    assert printed.endswith(f"--eval-episodes 0 --export {folder.name}-model")  # it writes, and evaluates nothing


def test_sampler_equals_teacher_forcing_without_padding(model, tmp_path):
    """Cache, positions and padding: each response alone, its prompt unpadded, through the plain model."""
    args = arguments(model, tmp_path, temperature=0.8, max_new_tokens=8)
    task, policy = popo.make_task_and_policy(args)
    torch.manual_seed(2)
    groups = popo.generate_groups(policy, task, args, 1)
    batch = popo.stack_groups(groups, "cpu")
    assert not batch["prompt_mask"].all()
    recomputed, _ = popo.response_logprobs(policy, batch, 0.8)
    torch.testing.assert_close(recomputed, batch["logprobs"], atol=1e-4, rtol=0)
    for group in groups:
        for response, mask, logprobs in zip(group["responses"], group["mask"], group["logprobs"], strict=True):
            prompt, length = group["prompts"][group["prompt_mask"]], int(mask.sum())
            logits = policy.model(torch.cat([prompt, response[:length]])[None]).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits / 0.8, -1)[torch.arange(length), response[:length]]
            torch.testing.assert_close(logprobs[:length], expected, atol=1e-4, rtol=0)


def test_logits_are_cut_to_the_longest_answer_and_expanded_one_answer_at_a_time(model, tmp_path, monkeypatch):
    """Values and gradients are those of the plain formula; what the graph keeps of the vocabulary is the logits alone."""
    args = arguments(model, tmp_path, max_new_tokens=12)
    task, policy = popo.make_task_and_policy(args)
    torch.manual_seed(4)
    batch = popo.stack_groups(popo.generate_groups(policy, task, args, 1), "cpu")
    batch["mask"][..., 7:] = False
    batch["mask"][0, 0, 3:] = False
    original, passes = policy.forward, []

    def recorded(tokens, cache):
        passes.append(original(tokens, cache))
        return passes[-1]

    monkeypatch.setattr(policy, "forward", recorded)
    vocabulary, kept = policy.model.config.vocab_size, []

    def keep(tensor):
        kept.append(tensor.numel() if tensor.shape[-1:] == (vocabulary,) and tensor.dim() > 1 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, entropy = popo.response_logprobs(policy, batch, 0.9)
    ((rest, _),) = passes
    assert rest.shape == (12, 6, vocabulary) and logprobs.shape == entropy.shape == (4, 3, 12)
    head = policy.model.lm_head.weight.numel()
    assert (
        sum(kept) <= 4 * 3 * 7 * vocabulary + 2 * head
    )  # the head's weight for prompts and for answers; log_softmax and exp would each keep as much as the logits again
    monkeypatch.undo()
    first, cache = policy.prefill(batch["prompts"], batch["prompt_mask"], 3)
    logits = torch.cat([first[:, None], policy(batch["responses"].flatten(0, 1)[:, :-1], cache)[0]], 1).unflatten(0, (4, 3))
    plain = torch.log_softmax(logits.float() / 0.9, -1)
    expected = plain.gather(-1, batch["responses"].unsqueeze(-1)).squeeze(-1) * batch["mask"]
    expected_entropy = -(plain.exp() * plain).sum(-1) * batch["mask"]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=0)
    ours = torch.autograd.grad((logprobs + 0.1 * entropy).sum(), list(policy.parameters()))
    theirs = torch.autograd.grad((expected + 0.1 * expected_entropy).sum(), list(policy.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompt", ["chat", "few-shot"])
def test_sample_answers_show_the_problem(model, tmp_path, prompt):
    """Also in a chat, whose last line is a header."""
    args = arguments(model, tmp_path, prompt=prompt)
    task, policy = popo.make_task_and_policy(args)
    torch.manual_seed(1)
    groups = popo.generate_groups(policy, task, args, 1)
    torch.manual_seed(1)
    problems = task.problems(args.num_prompts, test=False)
    for i, group in enumerate(groups):
        numbers = [n for n in problems["numbers"][i].tolist() if n]
        line = popo.sample_answers(task, [group], 1).splitlines()[0]
        assert all(str(n) in line for n in [*numbers, problems["target"][i].item()])
    group["prompts"] = torch.tensor(task.tokenizer("no digit\n<|assistant|>")["input_ids"])  # of a task of one's own
    group["prompt_mask"] = torch.ones_like(group["prompts"], dtype=torch.bool)
    assert popo.sample_answers(task, [group], 1).startswith("no digit ")


def test_every_end_token_of_the_model_ends_an_answer(model, tmp_path):
    """Chat models end a turn with a token of their own, which only their generation settings name."""
    task, policy = popo.make_task_and_policy(arguments(model, tmp_path))
    assert task.eos == (task.tokenizer.eos_token_id,)
    few_shot, _ = popo.make_task_and_policy(arguments(model, tmp_path, prompt="few-shot"))
    assert {few_shot.tokenizer.decode([i]) for i in few_shot.eos} == {"\n", "<|end|>"}  # the line ends the answer
    ends = [task.tokenizer.eos_token_id, task.tokenizer.convert_tokens_to_ids("<|user|>")]
    policy.model.generation_config.eos_token_id = ends
    policy.model.save_pretrained(tmp_path / "chat")
    task.tokenizer.save_pretrained(tmp_path / "chat")
    assert set(popo.make_task_and_policy(arguments(str(tmp_path / "chat"), tmp_path))[0].eos) == set(ends)


def test_replayed_prompts_of_another_width(model, tmp_path):
    """Groups of different iterations are padded to one width, which changes no log-prob."""
    args = arguments(model, tmp_path)
    task, policy = popo.make_task_and_policy(args)
    torch.manual_seed(3)
    groups = popo.generate_groups(policy, task, args, 1)
    short = min(groups, key=lambda group: group["prompt_mask"].sum())
    narrow = short | {key: short[key][~short["prompt_mask"].cumsum(0).eq(0)] for key in ("prompts", "prompt_mask")}
    widest = next(group for group in groups if group["prompt_mask"].all())
    assert len(narrow["prompts"]) < len(widest["prompts"])
    batch = popo.stack_groups([narrow, widest], "cpu")
    recomputed, _ = popo.response_logprobs(policy, batch, args.temperature)
    torch.testing.assert_close(recomputed, batch["logprobs"], atol=1e-4, rtol=0)


def test_rewards_read_the_decoded_text_up_to_the_end_token(model, tmp_path):
    task, _ = popo.make_task_and_policy(arguments(model, tmp_path, format_reward=0.1))
    problems = {"numbers": torch.tensor([[20, 3, 7, 0]]), "target": torch.tensor([81])}
    texts = ["let me see <answer>(20 + 7) * 3</answer>", "<answer>20 + 7 + 3</answer>", "<answer>81</answer>"]
    texts += ["in <answer> tags:\n<answer>(20 + 7) * 3</answer>", "<answer>(20 + 7) * 3</answer>, no more <answer>"]
    rows = [task.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [5] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    rewards, well_formed = task.rewards(problems, tokens[None], mask[None])
    assert rewards[0].tolist() == [1.0, pytest.approx(0.1), 0.0, 1.0, 1.0]
    assert well_formed[0].tolist() == [True, True, False, True, True]
    mask[0, len(rows[0]) - 4 :] = False  # cut inside the closing tag
    assert task.rewards(problems, tokens[None], mask[None])[0][0, 0] == 0


def some_reward(self, problems, responses, mask):
    """A random model never answers: reward a letter instead, so that groups differ."""
    return ((responses % 2 == 0) & mask).float().mean(-1), mask[..., 0]


EXTRAS = {"plain": {}, "micro": {"micro_batch": 1}, "bfloat16": {"dtype": "bfloat16"}, "kl": {"kl_coef": 0.1}}
EXTRAS["generation"] = {"micro_batch": 1, "generation_batch": 256}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_run_from_a_folder(model, tmp_path, monkeypatch, extra):
    monkeypatch.setattr(popo.TextCountdown, "rewards", some_reward)
    original, sizes = popo.sample, []
    monkeypatch.setattr(
        popo, "sample", lambda policy, prompts, *rest: (sizes.append(len(prompts)), original(policy, prompts, *rest))[1]
    )
    result = popo.main(arguments(model, tmp_path, **extra))
    sizes.remove(1)  # the question whether the model can share a prompt
    assert sizes == ([4, 2, 2, 2, 4, 2, 2, 2, 4, 2] if extra == EXTRAS["micro"] else [6, 4, 6, 4, 6])  # prompts at once
    (folder,) = tmp_path.iterdir()  # no warm-up here
    assert result["updates"] == 4 and result["total_timesteps"] == 24 and "transformers" in result["versions"]
    assert result == read_json(folder / "result.json")
    before = {f"model.{name}": value for name, value in Qwen2ForCausalLM.from_pretrained(model).state_dict().items()}
    after = read_pt(folder / "model.pt")["model"]
    assert before.keys() == after.keys() and len(differences(before, after)) > 10
    assert all(value.dtype == torch.float32 for value in after.values())
    limit = 0.1 if extra.get("dtype") else 1e-4
    assert max(value for _, value in read_scalars(folder)["is/log_ratio_max_fresh"]) < limit


def test_micro_batches_sum_to_the_same_update(model, tmp_path, monkeypatch):
    monkeypatch.setattr(popo.TextCountdown, "rewards", some_reward)
    weights = []
    for size in (32, 3):  # 1 would also split the sampling, hence draw other numbers
        popo.main(arguments(model, tmp_path / str(size), micro_batch=size, total_timesteps=12, learning_rate=1e-5))
        weights.append(read_pt(next((tmp_path / str(size)).glob("*/checkpoint.pt")))["optimizer"]["state"])
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key]["exp_avg"], weights[1][key]["exp_avg"], atol=1e-6, rtol=1e-3)


def test_a_resumed_run_may_change_what_fits_the_machine(model, tmp_path, monkeypatch):
    """Where it runs, and how much at once: a folder of the model stays found, and the way out of a full GPU is open."""
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(model, tmp_path)
    flags = ["--model", relative, "--prompt", "chat", "--eval-episodes", "0", "--env-id", "countdown-34", "--max-number", "99"]
    args = popo.parse_args([*flags, "--run-dir", str(tmp_path / "runs"), "--max-new-tokens", "4", "--total-timesteps", "64"])
    assert args.model == model
    popo.refuse_contradictions(dataclasses.replace(args, micro_batch=2), args, "the run to resume")
    with pytest.raises(ValueError, match="--group-size 3 contradicts"):
        popo.refuse_contradictions(dataclasses.replace(args, group_size=3), args, "the run to resume")


def test_resume_and_evaluate(model, tmp_path, monkeypatch):
    monkeypatch.setattr(popo.TextCountdown, "rewards", some_reward)
    reference = popo.main(arguments(model, tmp_path / "reference"))
    original, calls = popo.generate_groups, []

    def crash(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(popo, "generate_groups", crash)
        with pytest.raises(KeyError):
            popo.main(arguments(model, tmp_path / "crashed"))
    resumed = popo.main(arguments(model, tmp_path / "crashed", resume=True))
    assert resumed["curve"] == reference["curve"]
    (folder,) = (tmp_path / "crashed").iterdir()
    (other,) = (tmp_path / "reference").iterdir()
    assert differences(*(read_pt(path / "model.pt")["model"] for path in (folder, other))) == []
    result = popo.main(popo.parse_args(["--evaluate", str(folder / "model.pt")]))
    assert result["success_rate"] == reference["eval_success_rate"]
    moved = shutil.copytree(model, tmp_path / "moved")  # the model's folder may have moved since
    arguments_again = ["--evaluate", str(folder / "model.pt"), "--model", str(moved)]
    assert popo.main(popo.parse_args(arguments_again))["success_rate"] == reference["eval_success_rate"]
    with pytest.raises(ValueError, match="--eval-episodes 0 leaves --evaluate nothing to do"):
        popo.main(popo.parse_args(["--evaluate", str(folder / "model.pt"), "--eval-episodes", "0"]))


def test_model_that_cannot_be_loaded(tmp_path):
    with pytest.raises(
        ValueError, match=r"--model .*nowhere cannot be loaded \(\w+: .+\): give smollm2, or the name"
    ) as error:
        popo.main(arguments(str(tmp_path / "nowhere"), tmp_path / "runs"))
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()
