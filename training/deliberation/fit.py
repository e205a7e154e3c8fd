"""Fitting the small guard: by examples (transformers' Trainer), and by rewards for answers (TRL's GRPOTrainer)."""

import tempfile
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from negtome.guard.decision import verify
from negtome.guard.mini import END, LONGEST, PADDING, UNKNOWN, read
from negtome.guard.policy import Policy
from training.deliberation.requests import Request

#: Largest number of words of a prompt and its reply.
CONTEXT = 192
#: Label of words that the loss leaves out.
IGNORED = -100
#: Examples in a step.
BATCH = 16
#: Prompts in a step of rewards, and the number of replies to each, which are compared with each other.
PROMPTS, TRIES = 4, 8
#: Arguments of both trainers: one pass on the CPU, without logs, checkpoints or bars.
UNATTENDED = {
    "num_train_epochs": 1,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def new_model(policy: Policy, tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """Return an untrained model for the tokenizer; its config names the policy that it will be trained on."""
    set_seed(seed)
    numbers = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(numbers),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=numbers[PADDING],
        bos_token_id=None,
        eos_token_id=numbers[END],
        policy_sha256=policy.sha256,
        attn_implementation="eager",  # the fastest for so few words on a CPU
    )
    return LlamaForCausalLM(config)


def fit_examples(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    examples: Sequence[tuple[str, Sequence[str]]],
    seed: int,
    rate: float = 2e-3,
) -> None:
    """Train a model, once on each example, to write the replies to prompts; the prompts themselves are not learnt."""
    numbers, rows = tokenizer.get_vocab(), []
    for prompt, reply in examples:
        words, answer = tokenizer.encode(prompt).ids, [numbers[word] for word in reply]
        rows.append({"input_ids": words + answer, "labels": [IGNORED] * len(words) + answer})

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, len(rows) // BATCH // 10),
            weight_decay=0.05,
            seed=seed,
            remove_unused_columns=False,
            **UNATTENDED,
        )
        collator = DataCollatorForSeq2Seq(_reader(tokenizer), label_pad_token_id=IGNORED)
        _quietly(Trainer(model, arguments, data_collator=collator, train_dataset=rows))
    model.eval()


def _reader(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PADDING, eos_token=END, unk_token=UNKNOWN)


def _quietly(trainer: Trainer) -> None:
    """Train without what the trainer prints at its end."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def reward_of(policy: Policy, clauses: Sequence[str], words: Sequence[str]) -> float:
    """Return the reward of a reply, from 0 to 1: by its outcome and its quote; no other word of the trace counts.

    A quarter each for the right action and for exactly the right clauses, a half for both in a decision that verifies.

    Args:
        policy: verifies the decision.
        clauses: that apply.
        words: the reply.
    """
    decision = read(words)
    action = decision.action == policy.action_of(clauses)
    cited = bool(decision.action) and sorted(decision.clauses) == sorted(clauses)
    return action / 4 + cited / 4 + (action and cited and not verify(policy, decision)) / 2


def fit_rewards(
    model: LlamaForCausalLM, tokenizer: Tokenizer, policy: Policy, requests: Sequence[Request], seed: int, rate: float
) -> None:
    """Train a model, once on each request, on the rewards of its own replies (`reward_of`)."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    numbers = tokenizer.get_vocab()
    names = {number: word for word, number in numbers.items()}

    def rewards(completion_ids: Sequence[Sequence[int]], clauses: Sequence[Sequence[str]], **_: object) -> list[float]:
        replies = [[names[number] for number in ids] for ids in completion_ids]
        return [reward_of(policy, *pair) for pair in zip(clauses, replies, strict=True)]

    rows = [{"prompt": request.text, "clauses": list(request.clauses)} for request in requests]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=PROMPTS * TRIES,
            num_generations=TRIES,
            max_completion_length=LONGEST,
            learning_rate=rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            seed=seed,
            bf16=False,
            gradient_checkpointing=False,
            **UNATTENDED,
        )
        _quietly(GRPOTrainer(model, rewards, arguments, Dataset.from_list(rows), processing_class=_reader(tokenizer)))
    model.eval()


@torch.inference_mode()
def replies(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str], batch: int = 100) -> list[list[str]]:
    """Return a model's greedy replies to prompts, words up to `END`, many prompts at a time."""
    padding, encoded = tokenizer.token_to_id(PADDING), [tokenizer.encode(text).ids for text in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    texts: dict[int, list[str]] = {}
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        longest = len(encoded[numbers[-1]])
        ids = torch.tensor([[padding] * (longest - len(encoded[number])) + encoded[number] for number in numbers])
        output = model.generate(ids, attention_mask=(ids != padding).long(), do_sample=False, max_new_tokens=LONGEST)
        for number, line in zip(numbers, output[:, longest:].tolist(), strict=True):
            words = [tokenizer.id_to_token(word) for word in line]
            texts[number] = words[: words.index(END) + 1] if END in words else words
    return [texts[number] for number in range(len(prompts))]
