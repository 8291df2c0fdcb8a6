"""Loads exports in a process with another version of transformers and without pgprune, and writes what they compute.

The arguments are model directories. Each gets the logits of `tokens.pt` in `logits-<version>.pt`, and the token ids of
the texts in `token_ids.json` in `ids-<version>.json`. A model that is refused gets an `error-<version>.txt`.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

VERSION = transformers.__version__
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def main(directory: Path) -> None:
    texts = directory / "token_ids.json"
    if texts.exists():
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
        ids = {text: list(tokenizer(text)["input_ids"]) for text in json.loads(texts.read_text())}
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
        inputs = sorted(tokenizer("a"))
        chat = tokenizer.chat_template
        found = {"ids": ids, "special": special, "inputs": inputs, "chat": chat, "decoded": tokenizer.decode(ids[" "])}
        (directory / f"ids-{VERSION}.json").write_text(json.dumps(found))
    if (directory / "tokens.pt").exists():
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, trust_remote_code=True, output_loading_info=True, dtype="auto", attn_implementation="eager"
        )
        assert not any(info.values()), info
        with torch.inference_mode():
            logits = model.eval()(torch.load(directory / "tokens.pt")).logits
        torch.save(logits, directory / f"logits-{VERSION}.pt")


for name in sys.argv[1:]:
    try:
        main(Path(name))
    except Exception:
        (Path(name) / f"error-{VERSION}.txt").write_text(traceback.format_exc())
