"""Fitting the small guard: by examples (transformers' Trainer), and by rewards for answers (TRL's GRPOTrainer)."""

import tempfile
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from transformers import (
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

#: Words of a prompt and its reply, at most.
CONTEXT = 192
#: What the loss leaves out.
IGNORED = -100
#: Examples in a step.
BATCH = 16
#: Prompts in a step of rewards, and replies to each, which are compared with each other.
PROMPTS, TRIES = 4, 8
#: Of both trainers: one pass on the CPU, without logs, checkpoints or bars.
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
    """Return an untrained model that fits the tokenizer; its config names the policy that it is to be trained on."""
    set_seed(seed)
    numbers = tokenizer.get_vocab()
    model = LlamaForCausalLM(
        LlamaConfig(
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
            attn_implementation="eager",  # of so few words faster than any other, on a CPU
        )
    )
    return model


def fit_examples(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    examples: Sequence[tuple[str, Sequence[str]]],
    seed: int,
    rate: float = 2e-3,
) -> None:
    """Train a model, once on each, to write the replies to prompts; the prompts themselves are not learnt."""
    rows, numbers = [], tokenizer.get_vocab()
    for prompt, reply in examples:
        rows.append((tokenizer.encode(prompt).ids, [numbers[word] for word in reply]))

    def collate(batch: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor | int]:
        longest, kept = max(len(a) + len(b) for a, b in batch), 1 + max(len(b) for _, b in batch)
        left = [longest - len(a) - len(b) for a, b in batch]
        ids = [[numbers[PADDING]] * n + a + b for n, (a, b) in zip(left, batch, strict=True)]
        labels = [[IGNORED] * (kept - len(b)) + b for _, b in batch]
        mask = [[0] * n + [1] * (longest - n) for n in left]
        named = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return {name: torch.tensor(values) for name, values in named.items()} | {"logits_to_keep": kept}

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
        _quietly(Trainer(model, arguments, data_collator=collate, train_dataset=rows))
    model.eval()


def _quietly(trainer: Trainer) -> None:
    """Train without what the trainer prints at its end."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def reward_of(policy: Policy, clauses: Sequence[str], words: Sequence[str]) -> float:
    """Return what an answer is worth, from 0 to 1, by its outcome alone: no word of the trace counts, but its quote.

    A quarter each for the right action and for exactly the right clauses, a half for both in a decision that verifies.

    Args:
        policy: by which it is verified.
        clauses: that apply.
        words: that the model wrote.
    """
    decision = read(words)
    action = decision.action == policy.action_of(clauses)
    cited = bool(decision.action) and sorted(decision.clauses) == sorted(clauses)
    return action / 4 + cited / 4 + (action and cited and not verify(policy, decision)) / 2


def fit_rewards(
    model: LlamaForCausalLM, tokenizer: Tokenizer, policy: Policy, requests: Sequence[Request], seed: int, rate: float
) -> None:
    """Train a model, once on each, on requests without replies: on what its own replies are worth (`reward_of`)."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    numbers = tokenizer.get_vocab()
    names = {number: word for word, number in numbers.items()}

    def worth(completion_ids: Sequence[Sequence[int]], clauses: Sequence[Sequence[str]], **_: object) -> list[float]:
        written = [[names[number] for number in ids] for ids in completion_ids]
        return [reward_of(policy, cited, words) for cited, words in zip(clauses, written, strict=True)]

    rows = [{"prompt": request.text, "clauses": list(request.clauses)} for request in requests]
    reader = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PADDING, eos_token=END, unk_token=UNKNOWN)
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
        _quietly(GRPOTrainer(model, worth, arguments, Dataset.from_list(rows), processing_class=reader))
    model.eval()


@torch.inference_mode()
def replies(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str], batch: int = 100) -> list[list[str]]:
    """Return what a model writes to prompts, greedily: words up to `END`, many prompts at a time."""
    padding, found = tokenizer.token_to_id(PADDING), {}
    rows = sorted(
        ((tokenizer.encode(text).ids, number) for number, text in enumerate(prompts)), key=lambda row: len(row[0])
    )
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        longest = max(len(ids) for ids, _ in part)
        given = torch.tensor([[padding] * (longest - len(ids)) + ids for ids, _ in part])
        written = model.generate(
            given, attention_mask=(given != padding).long(), do_sample=False, max_new_tokens=LONGEST
        )[:, longest:]
        for (_, number), line in zip(part, written.tolist(), strict=True):
            words = [tokenizer.id_to_token(word) for word in line]
            found[number] = words[: words.index(END) + 1] if END in words else words
    return [found[number] for number in range(len(prompts))]
