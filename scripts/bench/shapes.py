"""Write the configs of Llamas of known shapes, without weights: enough for `pgprune search … --dry-run --on GPU`.

python scripts/bench/shapes.py FOLDER

pgprune search llama3-8b-50 --set model=FOLDER/llama3-8b --dry-run --on h100-80gb
"""

import argparse
from pathlib import Path

from subject import SHAPES, llama_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"gets a folder for each of {', '.join(SHAPES)}")
    folder = parser.parse_args().folder
    for name, shape in SHAPES.items():
        llama_config(shape).save_pretrained(folder / name)


if __name__ == "__main__":
    main()
