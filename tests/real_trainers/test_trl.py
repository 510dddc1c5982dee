"""The adapter in the real TRL: `make test-trainers`, in an environment of its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from trainer_contract import (
    ALPHA,
    STEPS,
    TEMPERATURE,
    TEXTS,
    Log,
    build,
    check,
    make_student,
    steps_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdcache
from kdcache.errors import KdcacheError

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        importlib.util.find_spec("trl") is None, reason="TRL is missing: make test-trainers"
    ),
]
PLAIN = {"padding_free": False, "packing": False}
FORMS = {
    "padded": PLAIN,
    "completion": {**PLAIN, "completion_only_loss": True},
    "padding-free": {"padding_free": True, "packing": False, "max_length": None},
    "bfd": {"packing": True, "packing_strategy": "bfd"},
    "bfd-split": {"packing": True, "packing_strategy": "bfd_split"},
}


@pytest.fixture(scope="module")
def student(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(stories260k, tmp_path_factory.mktemp("student"))


def dataset(form: str) -> Any:
    import datasets

    if form == "completion":
        rows = [{"prompt": text[:20], "completion": text[20:]} for text in TEXTS]
    else:
        rows = [{"text": text} for text in TEXTS]
    return datasets.Dataset.from_list(rows)


def trainer_of(
    student: Path, out: Path, form: str, steps: int, cache: str | None, **more: Any
) -> Any:
    from trl import SFTConfig

    from kdcache.integrations.trl import Distillation, SFTTrainer

    peft, loss = more.pop("peft_config", None), more.pop("loss", {})
    settings = {"max_length": 64, **FORMS[form], **more}
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        args=SFTConfig(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=10,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=dataset(form),
        processing_class=AutoTokenizer.from_pretrained(student),
        peft_config=peft,
        distillation=cache and Distillation(cache, temperature=TEMPERATURE, alpha=ALPHA, **loss),
    )


def cache_of(stories260k: Path, student: Path, form: str, folder: Path, **options: Any) -> str:
    prepared = trainer_of(student, folder / "prepare", form, 1, None)
    prepared.train_dataset.save_to_disk(str(folder / "prepared"))
    attend = {"attend": "document"} if FORMS[form]["packing"] else {}
    return build(stories260k, folder / "prepared", folder / "cache", **{**attend, **options})


@pytest.mark.parametrize("form", FORMS)
def test_the_contract(stories260k: Path, student: Path, tmp_path: Path, form: str) -> None:
    cache = cache_of(stories260k, student, form, tmp_path)

    def train(name: str, checkpoint: Path | None) -> Log:
        trainer = trainer_of(student, tmp_path / name, form, STEPS, cache)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return steps_of(trainer.state.log_history)

    check(cache, student, train, tmp_path)


def test_an_adapter_is_trained(stories260k: Path, student: Path, tmp_path: Path) -> None:
    """LoRA beside TRL's own patch of the forward; the base stays."""
    from peft import LoraConfig

    cache = cache_of(stories260k, student, "completion", tmp_path)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])

    def train(name: str, checkpoint: Path | None) -> Log:
        trainer = trainer_of(
            student, tmp_path / name, "completion", STEPS, cache, peft_config=lora, seed=3
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return steps_of(trainer.state.log_history)

    check(cache, student, train, tmp_path)
    kept = json.loads((tmp_path / "whole" / "checkpoint-20" / "adapter_config.json").read_text())
    assert kept["r"] == 8


def test_rows_of_another_length_are_missed(
    stories260k: Path, student: Path, tmp_path: Path
) -> None:
    cache = cache_of(stories260k, student, "padded", tmp_path)
    with pytest.raises(KdcacheError, match="6 of the 6 rows of a batch are not in"):
        trainer_of(student, tmp_path / "out", "padded", 2, cache, max_length=20).train()
    other = trainer_of(
        student, tmp_path / "hard", "padded", 2, cache, max_length=20, loss={"on_miss": "hard"}
    )
    other.train()
    assert [line["missed"] for line in steps_of(other.state.log_history)] == [1, 1]


def test_evaluation_is_that_of_the_trainer(
    stories260k: Path, student: Path, tmp_path: Path
) -> None:
    cache = cache_of(stories260k, student, "padded", tmp_path)
    own, plain = (
        trainer_of(student, tmp_path / "out", "padded", 2, one).evaluate(dataset("padded"))
        for one in (cache, None)
    )
    assert own["eval_loss"] == plain["eval_loss"]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
@pytest.mark.parametrize("codec", ["dense", "topk:2"])
def test_dpo_on_sums_of_a_cache_is_dpo_with_a_reference(
    stories260k: Path, student: Path, tmp_path: Path, codec: str
) -> None:
    """Every step's loss, ids as TRL's own, with no reference model, whatever the codec."""
    import datasets
    import trl

    from kdcache.integrations.trl import DPOTrainer

    words = " ".join(TEXTS).split()
    parts = [words[at : at + 24] for at in range(0, len(words) - 24, 8)][:16]
    records = [
        {
            "prompt": " ".join(part[:8]),
            "chosen": " " + " ".join(part[8:]),
            "rejected": " " + " ".join(part[:2:-2]),
        }
        for part in parts
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    for side in ("chosen", "rejected"):
        kdcache.build(
            kdcache.BuildOptions(
                teacher=(str(stories260k),),
                corpus=(str(tmp_path / "pairs.jsonl"),),
                out=str(tmp_path / side),
                columns=(f"completion={side}",),
                packing="none",
                codec=codec,
                workers=0,
            )
        )
    caches = (str(tmp_path / "chosen"), str(tmp_path / "rejected"))
    kdcache.export(kdcache.ExportOptions(caches, str(tmp_path / "out"), layout="dpo"))

    def arguments(name: str, **more: Any) -> Any:
        return trl.DPOConfig(
            str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **more,
        )

    tokenizer = AutoTokenizer.from_pretrained(student)
    own = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        args=arguments("own"),
        train_dataset=datasets.Dataset.from_parquet(
            sorted(map(str, (tmp_path / "out").glob("*.parquet")))
        ),
        processing_class=tokenizer,
    )
    assert own.ref_model is None
    theirs = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        ref_model=AutoModelForCausalLM.from_pretrained(stories260k),
        args=arguments("theirs"),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
    )
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert own.train_dataset[column][:] == theirs.train_dataset[column][:]
    losses = []
    for trainer in (own, theirs):
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1][0] != pytest.approx(0.6931, abs=0.05)  # the student is another model
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    print(codec, *losses)
    for wrong, message in (
        ({"max_length": 20}, "and max_length is 20"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
    ):
        with pytest.raises(KdcacheError, match=message):
            DPOTrainer(
                own.model,
                args=arguments("wrong", **wrong),
                train_dataset=own.train_dataset,
                processing_class=tokenizer,
            )
