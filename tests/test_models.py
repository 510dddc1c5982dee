"""kdcache's models in transformers' tables: whoever imports what first, and by its folder alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import further
from make_caches import CAUSAL, make_cache
from transformers import BertConfig, BertModel

from kdcache.cache import Cache
from kdcache.commands.finetune.finetune import finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.pretrained import tokenizer_files

pytestmark = pytest.mark.slow

LOAD = """
auto = AutoModelForSequenceClassification
bilstm, headed = (auto.from_pretrained(run) for run in sys.argv[1:3])
assert type(bilstm).__name__ == "BiLstmForSequenceClassification"
assert type(headed).__name__ == "HeadedForSequenceClassification"
assert bilstm.config.id2label == {0: "c0", 1: "c1", 2: "c2"}
assert headed.config.id2label == {0: "0", 1: "1"}
for model, run in ((bilstm, sys.argv[1]), (headed, sys.argv[2])):
    inputs = AutoTokenizer.from_pretrained(run)(["w3 w5", "w4"], padding=True, return_tensors="pt")
    inputs = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    assert model(**inputs).logits.shape == (2, model.config.num_labels)
"""
ORDERS = {
    "kdcache first": """
import sys
import kdcache
heavy = {"torch", "transformers", "numpy", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
from transformers import AutoModelForSequenceClassification, AutoTokenizer
""",
    "kdcache first, then the models' base": """
import sys
import kdcache
from transformers import PreTrainedModel, Trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
""",
    "transformers first, and plain students without kdcache": """
import sys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
words, _, lm, classes = sys.argv[1:]
assert AutoModelForCausalLM.from_pretrained(lm).config.model_type == "llama"
assert AutoTokenizer.from_pretrained(lm)("w3 w5")["input_ids"] == [3, 5]
assert AutoModelForSequenceClassification.from_pretrained(classes).config.model_type == "bert"
assert len(AutoTokenizer.from_pretrained(words)("w3 w5")["input_ids"]) == 2
assert not [name for name in sys.modules if name.split(".")[0] == "kdcache"]
import kdcache
""",
}
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders that train and finetune wrote."""
    import json

    folder = tmp_path_factory.mktemp("runs")
    make_cache(folder / "classes", [8])
    make_cache(folder / "causal", [8], task=CAUSAL, codec="topk:6")
    for name in ("bert", "llama"):
        (folder / f"{name}.json").write_text(json.dumps({"model_type": name, **SMALL}))
    found = {}
    for name, cache, student in (
        ("bilstm", "classes", "bilstm"),
        ("bert", "classes", str(folder / "bert.json")),
        ("llama", "causal", str(folder / "llama.json")),
    ):
        options = TrainOptions(
            cache=(str(folder / cache),), student=student, out=str(folder / name), max_steps=1,
            report_to="none", **({"hidden_size": 8} if student == "bilstm" else {}),
        )  # fmt: skip
        found[name] = train(options).out
    BertModel(BertConfig(vocab_size=64, **SMALL)).save_pretrained(folder / "encoder")
    for file, content in tokenizer_files(Cache.open(str(folder / "classes")).tokenizer()).items():
        (folder / "encoder" / file).write_bytes(content)
    rows = '{"text": "w3", "label": 1}\n{"text": "w4", "label": 0}\n'
    (folder / "rows.jsonl").write_text(rows)
    found["headed"] = finetune(
        FinetuneOptions(
            model=str(folder / "encoder"), corpus=(str(folder / "rows.jsonl"),),
            out=str(folder / "headed"), head_width=4, epochs=1,
        )
    ).out  # fmt: skip
    return found


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "order",
    # Here transformers always comes first: the tests of both models load them so.
    ["kdcache first", *further(*list(ORDERS)[1:])],
)
def test_our_models_are_found_whoever_is_imported_first(order: str, runs: dict[str, str]) -> None:
    folders = [runs[name] for name in ("bilstm", "headed", "llama", "bert")]
    code = ORDERS[order] + LOAD
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_is_a_model_folder(runs: dict[str, str]) -> None:
    names = {path.name for path in Path(runs["bilstm"]).iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "train.json"}
    assert "student.tmp" not in names
