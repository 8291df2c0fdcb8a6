"""Write the shipped recipes and the page that lists them from one table of models.

    python scripts/make_recipes.py [--check]

With --check, write nothing, and fail if a file is out of date or missing. Either way, fail if `configs/` holds a recipe
that is neither in the table nor one of `HAND_WRITTEN`.

No recipe is tuned to its model by measuring, except those of SmolLM2-135M. The others have the values of `_base.yaml`,
and differ only where memory, the layout of the family or the number of experts requires it.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recipe.settings import Setting, recovery_settings, size_settings, yaml_lines
from pgprune_cli.recipe.strict_yaml import to_yaml

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "recipes.md"
HAND_WRITTEN = ("_base.yaml", "demo.yaml", "paper/_reference.yaml")
SPARSITIES = (20, 30, 50)
"""Percent of the prunable parameters."""

GATED, MAYBE_GATED = "is gated", "may be gated"


@dataclass(frozen=True)
class Model:
    """A row of the table.

    name: what its recipes are called, without the sparsity; title: its name in text; hub: its repository on the Hugging
    Face Hub; family: its `model_type` in transformers; parameters: millions, of the text model with its embeddings, as
    transformers builds it from the repository's config.json; layers: of a model below 2 billion parameters; access:
    `GATED`, `MAYBE_GATED`, or "" if everyone can download it; directory: what the recipe reads if not the hub; notes:
    comment lines for the top of the file, in which {0} is the repository and {1} the directory; settings: what differs
    from `_base`, beyond the rules for the model's size; paper: what differs from the paper's settings, None if it has
    no recipes with them.
    """

    name: str
    title: str
    hub: str
    family: str
    parameters: int
    layers: int = 0
    access: str = ""
    directory: str = ""
    notes: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    paper: tuple[Setting, ...] | None = None

    @property
    def reads(self) -> str:
        """The value of the key `model`."""
        return self.directory or self.hub

    @property
    def size(self) -> str:
        """The number of parameters in words."""
        if self.parameters < 1000:
            return f"{self.parameters} million"
        return f"{self.parameters / 1000:.1f} billion"


PICKLED = ("The hub only has pickle files. Convert them once:", "    pgprune convert {} {}")
VISION = "The text model is pruned. The vision tower is exported as it is."
EXPERTS = "The family ffn covers whole experts and the channels inside experts."
FFN_ONLY = Setting(
    "units.families",
    ["ffn"],
    "q and k are normalised over all heads together, so removing a head would change the others",
)


def repair_of_experts(active: int, total: int) -> Setting:
    """Return the setting of a mixture of `total` experts, `active` of which read each token."""
    comment = f"{active} of {total} experts read each token, and an expert is repaired on its own tokens only"
    return Setting("repair.windows", 4000, comment)


def several_gpus(gigabytes: int) -> str:
    """Return the note for a model whose weights take that much in bfloat16."""
    return f"The weights take {gigabytes} GB in bfloat16. device: auto spreads them over as many GPUs as they need."


MODELS = (
    Model("llama-7b", "LLaMA-7B", "huggyllama/llama-7b", "llama", 6738, paper=()),
    Model("llama2-7b", "LLaMA-2-7B", "meta-llama/Llama-2-7b-hf", "llama", 6738, access=GATED, paper=()),
    Model("llama2-13b", "LLaMA-2-13B", "meta-llama/Llama-2-13b-hf", "llama", 13016, access=GATED, paper=()),
    Model(
        *("llama3-8b", "LLaMA-3-8B", "meta-llama/Meta-Llama-3-8B", "llama", 8030),
        access=GATED,
        paper=(Setting("search.learning_rate", 6.0e-3, "the paper's value for LLaMA-3"),),
    ),
    Model("llama-3.2-1b", "Llama-3.2-1B", "meta-llama/Llama-3.2-1B", "llama", 1236, 16, access=GATED),
    Model("llama-3.2-3b", "Llama-3.2-3B", "meta-llama/Llama-3.2-3B", "llama", 3213, access=GATED),
    Model(
        *("vicuna-7b", "Vicuna-7B", "lmsys/vicuna-7b-v1.5", "llama", 6738),
        directory="models/vicuna-7b",
        notes=PICKLED,
        paper=(),
    ),
    Model(
        *("vicuna-13b", "Vicuna-13B", "lmsys/vicuna-13b-v1.5", "llama", 13016),
        directory="models/vicuna-13b",
        notes=PICKLED,
        paper=(),
    ),
    Model(
        *("smollm2-135m", "SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "llama", 135, 30),
        directory="models/smollm2-135m",
        notes=(
            "The model is small enough for a laptop CPU. scripts/fetch_smollm2.sh downloads a GGUF file into {1}.",
            "{0} works too.",
        ),
        settings=(Setting("dtype", "fastest", "bfloat16 on machines with instructions for it, float32 on others"),),
        paper=(),
    ),
    Model("mistral-7b", "Mistral-7B", "mistralai/Mistral-7B-v0.1", "mistral", 7242, access=MAYBE_GATED, paper=()),
    Model(
        *("ministral-3-3b", "Ministral-3-3B", "mistralai/Ministral-3-3B-Base-2512", "mistral3", 3429),
        notes=(VISION,),
    ),
    Model(
        *("ministral-3-8b", "Ministral-3-8B", "mistralai/Ministral-3-8B-Base-2512", "mistral3", 8490),
        notes=(VISION,),
        settings=(Setting("weight_format", "int8", "with full weights the search would not fit on a 24 GB GPU"),),
    ),
    Model(
        *("mixtral-8x7b", "Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1", "mixtral", 46703),
        access=MAYBE_GATED,
        notes=(EXPERTS, several_gpus(93)),
        settings=(repair_of_experts(2, 8),),
    ),
    Model("qwen3-0.6b", "Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base", "qwen3", 596, 28),
    Model("qwen3-4b", "Qwen3-4B", "Qwen/Qwen3-4B-Base", "qwen3", 4022),
    Model("qwen3-8b", "Qwen3-8B", "Qwen/Qwen3-8B-Base", "qwen3", 8191),
    Model(
        *("qwen3-30b-a3b", "Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Base", "qwen3_moe", 30532),
        notes=(EXPERTS, several_gpus(61)),
        settings=(repair_of_experts(8, 128),),
    ),
    Model("gemma-3-1b", "Gemma-3-1B", "google/gemma-3-1b-pt", "gemma3_text", 1000, 26, access=GATED),
    Model(
        *("gemma-3-4b", "Gemma-3-4B", "google/gemma-3-4b-pt", "gemma3", 3880),
        access=GATED,
        notes=(VISION,),
    ),
    Model("phi-4-mini", "Phi-4-mini", "microsoft/Phi-4-mini-instruct", "phi3", 3836),
    Model("olmo-2-1b", "OLMo-2-1B", "allenai/OLMo-2-0425-1B", "olmo2", 1485, 16, settings=(FFN_ONLY,)),
    Model("olmo-2-7b", "OLMo-2-7B", "allenai/OLMo-2-1124-7B", "olmo2", 7299, settings=(FFN_ONLY,)),
    Model(
        *("gpt-oss-20b", "gpt-oss-20b", "openai/gpt-oss-20b", "gpt_oss", 20915),
        notes=(
            EXPERTS,
            "The hub has the experts in MXFP4. Unpack them first: `pgprune search` prints how.",
            several_gpus(42),
        ),
        settings=(repair_of_experts(4, 32),),
    ),
)


def header(model: Model, *lines: str) -> list[str]:
    """Return the comment lines at the top of a file: `lines`, then what to know before the model is read."""
    page = f"https://huggingface.co/{model.hub}"
    access = [f"The model {model.access}. Get access on its page first: {page}"] if model.access else []
    notes = [note.format(model.hub, model.directory) for note in model.notes]
    return [f"# {line}" for line in (*lines, *access, *notes)]


def base(model: Model) -> str:
    """Return the text of the base that all recipes of a model extend."""
    lines = header(
        model,
        f"{model.title} ({model.hub}), {model.size} parameters.",
        "The settings that its recipes share. Written by scripts/make_recipes.py; do not edit.",
    )
    own = size_settings(model.parameters * 10**6, model.layers, 2048, experts=EXPERTS in model.notes)
    by_key = {setting.key: setting for setting in (*own, *model.settings)}
    settings = sorted(by_key.values(), key=lambda setting: _order(setting.key))
    lines += [f"extends: {HAND_WRITTEN[0].removesuffix('.yaml')}"]
    return "\n".join([*lines, *yaml_lines([Setting("model", model.reads), *settings])]) + "\n"


def _order(key: str) -> tuple[bool, int]:
    """Return where a key stands in a recipe: the sections come last, in the order of the schema."""
    section = key.partition(".")[0]
    return "." in key, [field.name for field in fields(Recipe)].index(section)


def recipe(model: Model, percent: int) -> str:
    """Return the text of a recipe."""
    lines = header(
        model,
        f"{model.title} with {percent} % of its prunable parameters removed.",
        f"    pgprune search {model.name}-{percent}",
    )
    return "\n".join([*lines, f"extends: _{model.name}", *yaml_lines([budget(percent)])]) + "\n"


def paper_recipe(model: Model, percent: int) -> str:
    """Return the text of a recipe with the paper's settings."""
    lines = header(
        model,
        f"{model.title} with the paper's settings and {percent} % of its prunable parameters removed.",
        f"    pgprune search paper/{model.name}-{percent}",
    )
    settings = [Setting("extends", "_reference"), Setting("model", model.reads), budget(percent), *(model.paper or ())]
    settings += recovery_settings(model.parameters * 10**6, longest=2048)
    return "\n".join([*lines, *yaml_lines(settings)]) + "\n"


def budget(percent: int) -> Setting:
    return Setting("budget.sparsity", percent / 100)


def recipes() -> Iterator[tuple[Path, str]]:
    """Yield every recipe that the table describes, with its text."""
    for model in MODELS:
        yield CONFIGS / f"_{model.name}.yaml", base(model)
        for percent in SPARSITIES:
            yield CONFIGS / f"{model.name}-{percent}.yaml", recipe(model, percent)
            if model.paper is not None:
                yield CONFIGS / "paper" / f"{model.name}-{percent}.yaml", paper_recipe(model, percent)


INTRODUCTION = """\
# Shipped recipes

Written by `make references`; do not edit.

A recipe is called after its model and its sparsity in percent: `pgprune search llama2-7b-30` removes 30 % of the
prunable parameters of LLaMA-2-7B. `pgprune recipes` lists all recipes, and `pgprune recipes show llama2-7b-30` prints
one with every key. Recipes under `paper/` have the [paper's settings](paper.md). `demo` prunes the tiny model that
ships with pgprune.

Only the recipes for SmolLM2-135M were chosen by measuring their model. The others have the values of `_base.yaml`, and
differ where memory, the layout of the family or the number of experts requires it. From 6 billion parameters on they
read more text and take 5,120 forward passes in place of 320: by estimate, a 50 % search of 7 or 8 billion parameters
takes five minutes on an H100 ([Performance](performance.md)). A model with the same layout, such as an
instruction-tuned one, needs no recipe of its own: `--set model=Qwen/Qwen3-8B`.

*Parameters* counts the text model with its embeddings. You need access to *gated* models before pgprune can download
them: accept the licence on their page on the Hugging Face Hub, and log in with `hf auth login`.
"""


def page() -> str:
    """Return the page that lists the recipes."""
    columns = ("recipes", "model", "on the hub", "parameters", "sparsity", "own settings")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for model in MODELS:
        folders = f"`{model.name}-N`" + (f", `paper/{model.name}-N`" if model.paper is not None else "")
        gated = f" ({model.access.removeprefix('is ')})" if model.access else ""
        own = ", ".join(f"`{setting.key}: {to_yaml(setting.value)}`" for setting in model.settings)
        sparsities = ", ".join(map(str, SPARSITIES)) + " %"
        cells = (folders, model.title, f"`{model.hub}`{gated}", model.size, sparsities, own)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([INTRODUCTION, *lines]) + "\n"


def extra_files(written: dict[Path, str]) -> list[Path]:
    """Return the recipes in `configs/` that are neither written here nor by hand."""
    known = {*written, *(CONFIGS / name for name in HAND_WRITTEN)}
    return sorted(path for path in CONFIGS.rglob("*.yaml") if path not in known)


def main() -> None:
    """Write or check every file. Exit with a message if `configs/` holds another recipe."""
    from reference import write_or_check  # beside this script, which the tests import as a module

    written = dict(recipes())
    write_or_check({**written, PAGE: page()}, "the table in scripts/make_recipes.py")
    if extra := extra_files(written):
        sys.exit(f"{extra[0]}: no model in the table of scripts/make_recipes.py has this recipe. Remove the file.")


if __name__ == "__main__":
    main()
