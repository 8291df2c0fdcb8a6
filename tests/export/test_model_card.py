"""The model card: it says what happened to the model, and nothing that did not."""

from __future__ import annotations

import dataclasses

import torch
import yaml
from helpers.masks import keep_first
from helpers.models import tiny_model

from pgprune_cli.export.model_card import Loading, ModelCard
from pgprune_cli.model.masks import RepairedBlock
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.run.decision import Decision

MODEL = tiny_model("llama-gqa")
MASKS = keep_first(MODEL, [((2, 1), 7), (0, 0), (4, 24), (4, 24)])
DECISION = Decision(MASKS, "owner/base", "f00d", 0.25, "dtype: float32", 10, 80, 9, 2.5, dense_loss=2.25)
CARD = ModelCard(
    loading=Loading("small", "AutoModelForCausalLM", needs_code=False, loads_in_mlx=False),
    dense=PrunableModel.of(MODEL).shape,
    layers=MASKS,
    parameters_before=1000,
    parameters_after=800,
    padded_sparsity=None,
    measured=None,
)


def loaded(**how: bool) -> ModelCard:
    """Return the card of an export that is loaded in another way."""
    return dataclasses.replace(CARD, loading=dataclasses.replace(CARD.loading, **how))


def test_card_states_sizes_losses_recipe_and_origin() -> None:
    text = CARD.text(DECISION)
    facts = ("800 parameters", "20.0% fewer", "25.0%", "10 steps", "80 forward passes", "`f00d`", "2.5000", "2.2500")
    assert [fact for fact in facts if fact not in text] == []
    assert "| layer of the base model | KV heads | query heads | FFN channels |" in text
    assert "| 0 | 2 of 4 | 2 of 8 | 7 of 24 |\n| 1 (layer removed) | 0 of 4 | 0 of 8 | 0 of 24 |" in text
    assert "some of its KV heads and query heads and FFN channels" in text
    assert "```yaml\ndtype: float32\n```" in text
    assert "## Perplexity" not in text and "## Tasks" not in text


def test_card_says_which_losses_and_perplexities_have_bos() -> None:
    row = {"corpus": "c4", "seqlen": 128, "bos": True, "ppl": 9.0, "tokens": 127}
    card = dataclasses.replace(CARD, measured={"perplexity": [row, row | {"bos": False}]})
    text = card.text(dataclasses.replace(DECISION, bos=True))
    assert "| c4 | 128 | 9.00 | 127 | yes |" in text and "| c4 | 128 | 9.00 | 127 | no |" in text
    assert "begin with the BOS token" in text and "do not begin with BOS" in CARD.text(DECISION)


def test_front_matter_names_a_base_model_on_the_hub_and_no_local_path(tmp_path) -> None:
    assert yaml.safe_load(CARD.text(DECISION).split("---")[1])["base_model"] == "owner/base"
    text = CARD.text(dataclasses.replace(DECISION, model=str(tmp_path)))
    assert "base_model" not in text.split("---")[1] and str(tmp_path) not in text and tmp_path.name in text


def test_card_names_local_models_and_texts_without_their_directories() -> None:
    calibration = "calibration:\n  corpus: /home/me/a b.txt\n"
    recipe = f"model: /home/me/models/base\n{calibration}evaluation:\n  corpora: [own=/home/me/c.txt]"
    text = CARD.text(dataclasses.replace(DECISION, recipe=recipe))
    assert "/home" not in text
    assert "model: base\ncalibration:\n  corpus: a b.txt\nevaluation:\n  corpora: [own=c.txt]\n" in text


def test_card_says_which_step_the_decision_is_of_if_it_is_not_the_last() -> None:
    assert "of step 4, the best on held-out text" in CARD.text(dataclasses.replace(DECISION, best_step=4))
    assert all(
        "best on held-out" not in CARD.text(dataclasses.replace(DECISION, best_step=step)) for step in (None, 10)
    )


def test_card_mentions_code_only_if_loading_needs_it() -> None:
    assert "trust_remote_code" not in CARD.text(DECISION) and "mlx" not in CARD.text(DECISION)
    lines = [line for line in loaded(needs_code=True).text(DECISION).splitlines() if "Auto" in line]
    # transformers 5 asks at the terminal for the tokenizer, too
    assert [line.endswith("trust_remote_code=True)") for line in lines] == [False, True, True]
    assert "modeling_mlx.py" in loaded(loads_in_mlx=True).text(DECISION)


def test_card_mentions_repair_padding_and_search_only_if_they_happened() -> None:
    plain = CARD.text(DECISION)
    assert "refitted" not in plain and "padded" not in plain and "recover" not in plain
    repaired = dataclasses.replace(DECISION, repaired={(0, "ffn"): RepairedBlock(torch.zeros(2, 7), None)})
    assert "The output projections of pruned blocks were refitted on calibration text" in CARD.text(repaired)
    inner = {"gate_proj.weight": torch.zeros(7, 2), "up_proj.weight": torch.zeros(7, 2)}
    blocks = {(0, "ffn"): RepairedBlock(torch.zeros(2, 7), None, inner)}
    text = CARD.text(dataclasses.replace(DECISION, repaired=blocks))
    assert "weights of pruned blocks (gate_proj, up_proj, down_proj) were refitted on calibration text" in text
    assert "counts as kept, 12.5% were removed" in dataclasses.replace(CARD, padded_sparsity=0.125).text(DECISION)
    assert "without a search" in CARD.text(dataclasses.replace(DECISION, steps=0, forward_passes=0))
