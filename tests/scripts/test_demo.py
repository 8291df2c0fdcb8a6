"""The table that `make demo` prints, with stubs in place of the commands."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.scripts import script_module


def test_demo_table_explains_its_columns(monkeypatch, capsys) -> None:
    demo = script_module("demo")
    speed = {"prefill_tokens_per_second": 2000.0, "decode_tokens_per_second": 100.0}
    model = {"parameters": 540_000, "perplexity": [{"ppl": 2.9}], "speed": speed}
    measured = model | {"baselines": [model, model | {"parameters": 1_000_000}, model]}
    monkeypatch.setattr(demo, "pruned", lambda name, *_: (Path("models") / name, {"sparsity": 0.5}))
    monkeypatch.setattr(demo, "pgprune", lambda *_: json.dumps(measured))
    demo.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "50.0%" in printed and "1,000,000" in printed
    assert "original" in printed and "search" in printed and "recovered" in printed
    assert "Lower perplexity is better" in printed and "embeddings and norms are always kept" in printed
