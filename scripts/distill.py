"""Recover a pruned model by distillation: train it to predict what its dense model predicts.

    python scripts/distill.py MODEL --teacher DENSE --text FILE --out DIR [--steps 400] [--lora 16]

MODEL is a directory that `pgprune export` wrote, DENSE anything that a recipe's `model:` accepts, and FILE a corpus as
in `calibration.corpus`. DIR loads as MODEL does, with the same modelling file. Training needs gradients and the memory
for them: about 16 bytes a parameter, far less with --lora. Needs the extra: pip install 'pgprune[recovery]'.
The method is in pgprune_cli/recover/distillation.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pgprune_cli.errors import UserError
from pgprune_cli.recover.distillation import DistillationSettings, distill


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="the pruned model")
    add("--teacher", required=True, metavar="DENSE", help="the dense model it was pruned from")
    add("--text", required=True, metavar="FILE", help="the training text")
    add("--out", required=True, type=Path, metavar="DIR", help="the model directory to write; it must not exist")
    add("--steps", type=int, default=400, help="optimizer steps  [default: 400]")
    add("--batch", type=int, default=8, help="windows per forward pass  [default: 8]")
    add("--accumulate", type=int, default=1, help="batches per optimizer step  [default: 1]")
    add("--seqlen", type=int, default=128, help="tokens per window  [default: 128]")
    add("--lr", type=float, default=3e-4, help="peak learning rate  [default: 3e-4]")
    add("--lm", type=float, default=0.0, help="weight of the language modelling loss  [default: 0]")
    add("--lora", type=int, default=0, metavar="RANK", help="train LoRA adapters only, then merge them")
    add("--seed", type=int, default=0, help="[default: 0]")
    try:
        distill(DistillationSettings(**vars(parser.parse_args())))
    except UserError as error:
        sys.exit(f"distill: {error}")


if __name__ == "__main__":
    main()
