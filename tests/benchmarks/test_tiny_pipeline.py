import sys

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from benchmarks import tiny_pipeline
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from support.dermoscopy import PROMPTS


def test_other_tools_read_the_same_tokens(tmp_path, monkeypatch):
    folder = tmp_path / "micro"
    monkeypatch.setattr(sys, "argv", ["x", str(folder), "--size", "micro"])
    tiny_pipeline.main()
    pipeline = load_pipeline(str(folder))
    assert pipeline.unet.config.sample_size == 8
    tables = (str(folder / "tokenizer" / name) for name in ("vocab.json", "merges.txt"))
    plain = Tokenizer(BPE.from_file(*tables, end_of_word_suffix="</w>"))
    for word in sorted({word for prompt in PROMPTS for word in prompt.lower().split()}):
        # punctuation is a word of its own
        if word.isalpha():
            ids = pipeline.tokenizer(word, add_special_tokens=False).input_ids
            assert plain.encode(word).ids == ids
            assert len(ids) == 1


def test_an_unknown_size_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "x"), "--size", "huge"])
    with pytest.raises(SystemExit):
        tiny_pipeline.main()
    assert "invalid choice: 'huge' (choose from" in capsys.readouterr().err
