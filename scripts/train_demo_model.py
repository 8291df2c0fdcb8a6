"""Train the demo model: a small Llama with grouped query heads, on text of the demo grammar.

    python scripts/train_demo_model.py

The same seed on the same machine gives the same weights. The perplexities printed at the end show whether the model is
worth pruning: it must be far better than word frequencies, and much worse once random units are removed.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pgprune_cli.demo.grammar import generate

TRAINING_TEXT, HELD_OUT_TEXT = 0, 1
END = "<|endoftext|>"
WINDOW, BATCH = 128, 16
PEAK_RATE, WARMUP, WEIGHT_DECAY = 3e-3, 100, 0.1


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the text, with one special token for the beginning and the end."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=768, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model: six layers of four KV heads with two query heads each."""
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def tokens_of(text: str, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return all tokens of a text `(N,)`, however long it is."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int) -> None:
    """Train with AdamW on windows at random positions. The learning rate warms up, then falls to zero as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    started = time.monotonic()
    for step in range(steps):
        offsets = torch.randint(len(tokens) - WINDOW, (BATCH, 1))
        windows = tokens[offsets + torch.arange(WINDOW)]
        # Half of the windows start with the special token, so that the model works with and without it.
        windows[::2, 0] = model.config.bos_token_id
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Return the perplexity over consecutive windows of the tokens."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    return math.exp(model(input_ids=windows, labels=windows).loss.item())


def unigram_perplexity(tokens: torch.Tensor) -> float:
    """Return the lowest perplexity without context: the exponential of the entropy of the token frequencies."""
    frequencies = tokens.bincount() / len(tokens)
    return math.exp(torch.special.entr(frequencies).sum().item())


def pruned_at_random(model: LlamaForCausalLM, fraction: float, seed: int) -> LlamaForCausalLM:
    """Return a copy in which a fraction of all KV heads and of all channels, chosen at random, adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    pruned = copy.deepcopy(model)
    layers = pruned.model.layers
    kv_heads = torch.rand(len(layers), model.config.num_key_value_heads, generator=generator)
    channels = torch.rand(len(layers), model.config.intermediate_size, generator=generator)
    kept_kv_heads, kept_channels = kv_heads > kv_heads.quantile(fraction), channels > channels.quantile(fraction)
    width = model.config.hidden_size // model.config.num_key_value_heads
    for index, layer in enumerate(layers):
        layer.self_attn.o_proj.weight.data *= kept_kv_heads[index].repeat_interleave(width)
        layer.mlp.down_proj.weight.data *= kept_channels[index]
    return pruned


def main() -> None:
    """Train and save the model, and print its perplexities before and after random pruning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pgprune_cli/demo/model"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0, help="for the initial weights and the order of the windows")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(2)  # the order of sums depends on it, and with it the weights
    text = generate(TRAINING_TEXT, 16_000_000)
    tokenizer = train_tokenizer(text[:1_000_000])
    model = new_model(tokenizer)
    train(model, tokens_of(text, tokenizer), args.steps)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    model.eval()
    held_out = tokens_of(generate(HELD_OUT_TEXT, 60_000), tokenizer)
    print(f"unigram  {unigram_perplexity(held_out):8.2f}")
    print(f"dense    {perplexity(model, held_out):8.2f}")
    for fraction in (0.3, 0.4, 0.5):
        draws = [perplexity(pruned_at_random(model, fraction, seed), held_out) for seed in range(10)]
        print(f"random {fraction:.0%}  best {min(draws):.2f}  worst {max(draws):.2f} of {len(draws)}")


if __name__ == "__main__":
    main()
