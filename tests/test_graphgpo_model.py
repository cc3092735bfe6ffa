"""`--model` with a tiny, randomly initialised Qwen2 and a tokenizer of its own in a folder: no download, the real path."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import differences, read_json, read_pt, read_scalars, run_script

from graphgpo_sokoban import Args, ArgumentError, LanguageAgent, main, make_agent, make_env, parse_args, refuse_contradictions

WORDS = "<pad> <end> <unk> # . O X P <think> </think> <action> </action> up down left right".split()
TEMPLATE = "{% for message in messages %}{{ message['content'] }} <think>{% endfor %}"
FLAGS = {"num_groups": 2, "group_size": 3, "eval_episodes": 2, "max_new_tokens": 4, "minibatch_size": 24, "max_steps": 5}
FLAGS |= {"max_solution": 5, "micro_batch": 8, "prompt": "chat"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like one from the hub: config, weights, tokenizer, chat template, and sampling defaults that must not act."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    path = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(WORDS) if len(word) == 1 or word in ("<pad>", "<end>", "<unk>")}
    ends = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], chat_template=TEMPLATE, **ends)
    tokenizer.add_tokens([word for word in WORDS if word not in vocabulary])  # whole words, so that chance finds an action
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(WORDS))] == WORDS
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(WORDS), **sizes, **heads, eos_token_id=1, pad_token_id=0))
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=2.0, temperature=0.1, eos_token_id=1
    )
    model.save_pretrained(path)
    return path


@pytest.fixture
def agent(folder):
    torch.manual_seed(0)
    return LanguageAgent(Args(model=str(folder), prompt="chat", max_new_tokens=6, micro_batch=4, ent_coef=0.0))


def prompts(count):
    envs = make_env(Args(model="any", prompt="chat"), count)
    envs.reset([(1, 1, 1, i) for i in range(count)])
    return np.array(envs.prompts(np.arange(count)), dtype=object), envs.choices(np.arange(count))


def bias(agent, **logits):
    """Give words a logit of their own: the output layer becomes a constant, and the distribution known."""
    head = torch.nn.Linear(agent.model.config.hidden_size, len(WORDS))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, -20.0)
    with torch.no_grad():
        for word, value in logits.items():
            head.bias[WORDS.index(word)] = value
    agent.model.lm_head = head


def test_answers_that_the_model_cannot_read_are_refused(folder, agent, monkeypatch):
    args = Args(model=str(folder), prompt="chat", max_new_tokens=6, num_groups=1, group_size=2)
    envs = make_env(args, 2)
    envs.reset([(0, 0)] * 2)
    width = agent.encode(envs.prompts([0]))[0].shape[1]
    monkeypatch.setattr("graphgpo_sokoban.LanguageAgent", lambda args: agent)
    agent.model.config.max_position_embeddings = width + 6
    assert make_agent(args, envs) is agent
    agent.model.config.max_position_embeddings -= 1
    words = f"--max-new-tokens 6 with prompts of {width} tokens is more than the {width + 5} that --model .* reads: lower it"
    with pytest.raises(ArgumentError, match=words):
        make_agent(args, envs)


def test_logprobs_are_those_of_one_answer_at_a_time(agent):
    """Padding, batches and the cut to the longest answer change nothing: the plain model on every answer alone agrees."""
    obs, choices = prompts(7)
    obs[3] = "up"  # a much shorter prompt, hence padding
    with torch.no_grad():
        _, tokens, mask, logprobs = agent.act(obs, choices)
        again, entropy = agent.token_logprobs(obs, tokens, mask)
        assert (again - logprobs).abs().max() < 1e-5 and tokens.shape == mask.shape == logprobs.shape == (7, 6)
        for text, row, valid, found, spread in zip(obs, tokens, mask, logprobs, entropy, strict=True):
            ids, _ = agent.encode([text])
            logits = agent.model(torch.cat([ids[0], row[valid]])[None]).logits[0, ids.shape[1] - 1 : -1]
            expected = torch.distributions.Categorical(logits=logits)
            assert (found[valid] - expected.log_prob(row[valid])).abs().max() < 1e-5
            assert (spread[valid] - expected.entropy()).abs().max() < 1e-5
            assert not found[~valid].any() and not spread[~valid].any()


def test_generation_in_parts(agent, monkeypatch):
    """Eight times --micro-batch at once, or --generation-batch, whatever the rows; parts that end early are padded."""
    generate, sizes = agent.model.generate, []

    def recorded(input_ids, **how):
        sizes.append(len(input_ids))
        return generate(input_ids=input_ids, **how)[:, : input_ids.shape[1] + (2 if len(sizes) == 1 else 9)]

    monkeypatch.setattr(agent.model, "generate", recorded)
    agent.args.micro_batch = 1
    obs, choices = prompts(12)
    with torch.no_grad():
        actions, tokens, mask, logprobs = agent.act(obs, choices)
    assert sizes == [6, 6] and len(actions) == 12 and tokens.shape == mask.shape == logprobs.shape == (12, 6)
    assert not mask[:6, 2:].any() and (tokens[:6, 2:] == agent.pad).all() and mask[6:, 2:].any()
    assert (logprobs[~mask] == 0).all()
    agent.args.generation_batch = 12
    agent.act(obs, choices, want_logprobs=False)
    assert sizes == [6, 6, 12]


def test_a_vocabulary_is_expanded_for_one_answer_at_a_time(agent, monkeypatch):
    """And again in the backward pass, so that no log-probabilities of a whole vocabulary are kept."""
    obs, choices = prompts(3)
    with torch.no_grad():
        _, tokens, mask, _ = agent.act(obs, choices)
    log_softmax, shapes = torch.log_softmax, []
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim: (shapes.append(x.shape), log_softmax(x, dim))[1])
    logprobs, _ = agent.token_logprobs(obs, tokens, mask)
    assert shapes == 3 * [(int(mask.sum(1).max()), len(WORDS))]
    logprobs.sum().backward()
    assert len(shapes) == 6


def test_entropy_without_a_weight_builds_no_graph(agent):
    obs, choices = prompts(3)
    with torch.no_grad():
        _, tokens, mask, _ = agent.act(obs, choices)
    for weight in (0.0, 0.01):
        agent.args.ent_coef = weight
        logprobs, entropy = agent.token_logprobs(obs, tokens, mask)
        assert logprobs.requires_grad and entropy.requires_grad == (weight > 0) and (entropy[mask] > 0).all()


def test_mask_ends_with_the_first_end(agent):
    bias(agent, up=0.0, **{"<end>": 0.0})
    obs, choices = prompts(64)
    _, tokens, mask, _ = agent.act(obs, choices)
    for row, valid in zip(tokens.tolist(), mask.tolist(), strict=True):
        length = row.index(1) + 1 if 1 in row else 6
        assert valid == [True] * length + [False] * (6 - length)
    assert 1 < mask.sum(1).float().mean() < 3  # geometric: 2 on average


def test_an_answer_ends_where_its_mask_does(agent):
    """Whatever word a tokenizer without a padding token has at number 0, it is no part of the answer before it."""
    agent.args.prompt, agent.pad = "few-shot", WORDS.index("right")
    bias(agent, up=0.0, **{"<end>": 0.0})
    obs, choices = prompts(64)
    actions, _, mask, _ = agent.act(obs, choices)
    assert [action == 0 for action in actions] == [length == 2 for length in mask.sum(1).tolist()]  # `up <end>`
    assert 5 < (actions == 0).sum() < 30


def test_the_models_own_sampling_defaults_do_not_act(agent):
    """Its generation_config asks for top-k 1, temperature 0.1 and a repetition penalty; sampling must follow the log-probs."""
    bias(agent, up=0.0, down=0.0, left=math.log(2))
    obs, choices = prompts(200)
    torch.manual_seed(0)
    _, tokens, _, logprobs = agent.act(obs, choices)
    share = (
        torch.bincount(tokens.flatten(), minlength=len(WORDS))[[WORDS.index(word) for word in ("up", "down", "left")]]
        / tokens.numel()
    )
    assert (share - torch.tensor([0.25, 0.25, 0.5])).abs().max() < 0.04
    assert logprobs.exp().unique().round(decimals=3).unique().tolist() == [0.25, 0.5]
    _, tokens, *_ = agent.act(obs[:20], choices[:20], temperature=0.0)
    assert (tokens == WORDS.index("left")).all()


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<think> left is a wall </think> <action> up </action>", 0),
        ("<action>DOWN</action>", 1),
        ("<action> up </action> no, <action> left </action>", 2),
        ("<action> up </action> no, <action> jump </action>", -1),
        ("I answer in <action> tags. <action> up </action>", 0),
        ("<action> up </action> and no more <action> left", 0),
        ("up", -1),
        ("<action> up", -1),
        ("", -1),
    ],
)
def test_parse(agent, text, action):
    assert agent.parse(text, ("up", "down", "left", "right")) == action


@pytest.mark.parametrize(
    ("text", "action"), [(" up\nAction: left", 0), ("RIGHT ", 3), ("go up", -1), ("<action>up</action>", -1)]
)
def test_parse_few_shot(agent, text, action):
    """The first line is the answer."""
    agent.args.prompt = "few-shot"
    assert agent.parse(text, ("up", "down", "left", "right")) == action
    assert agent.parse(text, (" Up\n", "down  ", "left", "  right")) == action  # as an environment may write them


def test_chat_template_and_prompt(agent):
    obs, _ = prompts(1)
    ids, attention = agent.encode(obs)
    assert ids[0, -1] == WORDS.index("<think>") and attention.all()  # the template's end
    assert "up, down, left, right" in obs[0] and "<action> </action>" in obs[0]


def test_a_run_learns_to_answer(folder, tmp_path):
    """Only the penalty for impossible answers to learn from: hardly any answer is an action at first, then some are."""
    flags = {
        "learning_rate": 1e-2,
        "kl_coef": 0.0,
        "max_new_tokens": 3,
        "num_groups": 8,
        "group_size": 8,
        "minibatch_size": 64,
    }
    flags |= {"max_steps": 3, "max_solution": 3, "eval_episodes": 0, "total_episodes": 64 * 20, "micro_batch": 64}
    main(Args(model=str(folder), run_dir=str(tmp_path), **FLAGS | flags))
    invalid = [value for _, value in read_scalars(tmp_path / "Sokoban__graphgpo__1")["charts/invalid_actions"]]
    assert np.mean(invalid[:3]) > 0.95 and np.mean(invalid[-3:]) < 0.7, np.round(invalid, 2)


def test_run_and_resume(folder, tmp_path, monkeypatch):
    """The run folder of a language model, with the KL penalty to the initial one; resumed after a crash it is the same run."""
    import graphgpo_sokoban

    settings = FLAGS | {
        "model": str(folder),
        "total_episodes": 24,
        "learning_rate": 1e-3,
        "ent_coef": 0.1,
        "checkpoint_every": 6,
    }
    result = main(Args(run_dir=str(tmp_path / "a"), **settings))
    assert result["eval_episodes"] == 2 and 0 <= result["eval_success_rate"] <= 1 and result["total_episodes"] == 24
    assert "transformers" in result["versions"]
    scalars = read_scalars(tmp_path / "a" / "Sokoban__graphgpo__1")
    kl = [value for _, value in scalars["losses/reference_kl"]]
    assert 0 <= kl[0] < kl[-1]
    original, calls = graphgpo_sokoban.graph_diagnostics, []

    def crash(*args):
        calls.append(1)
        if len(calls) == 6:  # two groups per iteration: in the third
            raise RuntimeError("crash")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(graphgpo_sokoban, "graph_diagnostics", crash)
        with pytest.raises(RuntimeError, match="crash"):
            main(Args(run_dir=str(tmp_path / "b"), **settings))
    main(Args(run_dir=str(tmp_path / "b"), resume=True, **settings))
    a, b = (read_pt(tmp_path / name / "Sokoban__graphgpo__1" / "checkpoint.pt") for name in "ab")
    assert a["iteration"] == 4 and differences({**a, "seconds": 0, "scalars": 0}, {**b, "seconds": 0, "scalars": 0}) == []


def test_gradients_add_up_over_microbatches(folder, tmp_path):
    """The smaller forward passes give the same run up to rounding."""
    settings = FLAGS | {"model": str(folder), "total_episodes": 6, "learning_rate": 1e-3, "eval_episodes": 0}
    for size in (3, 1000):
        main(Args(run_dir=str(tmp_path), exp_name=str(size), **settings | {"micro_batch": size}))
    a, b = (read_pt(tmp_path / f"Sokoban__{size}__1" / "checkpoint.pt")["model"] for size in (3, 1000))
    assert max((a[name] - b[name]).abs().max() for name in a) < 2e-4  # Adam's steps are 1e-3


def test_command_line(folder, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    process, run = run_script("graphgpo_sokoban", tmp_path, "--model", folder, "--total-episodes", 6, *flags)
    assert process.returncode == 0, process.stderr
    args = read_json(run / "args.json")
    assert args["learning_rate"] == 1e-6 and args["model"] == str(folder)
    assert json.loads((run / "result.json").read_text())["total_episodes"] == 6


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"--model .*nothing cannot be loaded \(\w+: .+\): give smollm2"):
        main(Args(model=str(tmp_path / "nothing"), run_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_a_resumed_run_may_change_what_fits_the_machine(folder, tmp_path, monkeypatch):
    """Where it runs, and how much at once: a folder of the model stays found, and the way out of a full GPU is open."""
    monkeypatch.chdir(folder)
    args = parse_args(["--model", ".", "--micro-batch", "8"])
    assert args.model == str(folder)
    refuse_contradictions(replace(args, micro_batch=2), args, "the run to resume")
    with pytest.raises(ValueError, match="--group-size 3 contradicts"):
        refuse_contradictions(replace(args, group_size=3), args, "the run to resume")


def test_text_games_with_a_model(folder, tmp_path):
    """TextWorld end to end, choices that change from step to step; the curve begins before training."""
    settings = FLAGS | {"num_groups": 1, "group_size": 2, "eval_episodes": 1, "max_steps": 3}
    del settings["max_solution"]
    settings |= {"game_level": 1, "total_episodes": 2, "eval_every": 0}
    args = Args(env_id="tw-coin_collector", model=str(folder), run_dir=str(tmp_path), **settings)
    result = main(args)
    assert result["total_timesteps"] == 6 and "textworld" in result["versions"]
    curve = read_scalars(tmp_path / "tw-coin_collector__graphgpo__1")["eval/success_rate"]
    assert [step for step, _ in curve] == [0, 2]


def test_choices_of_a_step_decide_what_is_valid(agent):
    bias(agent, **{"<action>": 0.0})
    agent.tokenizer = SimpleNamespace(decode=lambda *_, **__: "<action> go east </action>", chat_template=None)
    agent.encode = lambda texts: (torch.full((len(texts), 3), 2), torch.ones(len(texts), 3, dtype=torch.bool))
    actions, *_ = agent.act(np.array(["", ""], dtype=object), [("look", "go east"), ("look",)])
    assert actions.tolist() == [1, -1]
