"""What `make demo` says at its end, of commands that are made up."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.scripts import script_module


def test_the_table_says_what_sparsity_is_of(monkeypatch, capsys) -> None:
    demo = script_module("demo")
    speed = {"prefill_tokens_per_second": 2000.0, "decode_tokens_per_second": 100.0}
    model = {"parameters": 540_000, "perplexity": [{"ppl": 2.9}], "speed": speed}
    measured = model | {"baselines": [model, model | {"parameters": 1_000_000}]}
    monkeypatch.setattr(demo, "pruned", lambda name, *_: (Path("models") / name, {"sparsity": 0.5}))
    monkeypatch.setattr(demo, "pgprune", lambda *_: json.dumps(measured))
    demo.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "50.0%" in said and "1,000,000" in said
    assert "Sparsity is of what can go, heads and FFN channels; embeddings and norms stay" in said
