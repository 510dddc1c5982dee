"""Students of `examples/recovery` with the real torchao: `make test-trainers`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_contract import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdcache
from kdcache.student import load_student

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        importlib.util.find_spec("torchao") is None, reason="torchao is missing: make test-trainers"
    ),
]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "recovery"


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(ids).logits
    return found


def test_nvfp4_is_what_its_definition_says() -> None:
    """E2M1 has the sizes 0, 0.5, 1, 1.5, 2, 3, 4, 6; a block's scale is E4M3 on a float32 one."""
    pytest.importorskip("torchao.prototype.mx_formats")
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    whole = per_tensor_amax_to_scale(weight.abs().max())
    torch.testing.assert_close(whole, weight.abs().max() / (448 * 6))
    got = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=whole).dequantize(torch.float32)
    blocks = weight.unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float()
    scaled = blocks / (scale * whole)
    nearest = sizes[(scaled.abs()[..., None] - sizes).abs().argmin(-1)] * scaled.sign()
    torch.testing.assert_close(got, (nearest * scale * whole).flatten(1))


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_what_is_trained_is_what_torchao_converts_and_loads_again(
    kind: str, stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import students

    monkeypatch.setattr(students, "TEACHER", str(stories260k))
    corpus, run = tmp_path / "corpus.txt", str(tmp_path / "run")
    corpus.write_text("\n".join(TEXTS))
    cache = str(tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    ids = tokenizer(" ".join(TEXTS), return_tensors="pt")["input_ids"]
    kdcache.build(
        kdcache.BuildOptions(
            teacher=(str(stories260k),), corpus=(str(corpus),), out=cache, codec="hidden:float16",
            max_length=64, workers=0,
        )
    )  # fmt: skip
    kdcache.train(
        kdcache.TrainOptions(
            cache=(cache,), student=f"students:{kind}", out=run, alpha=0.0, epochs=20,
            batch_size=4, learning_rate=3e-4,
        )
    )  # fmt: skip
    trained = load_student(run, trust_remote_code=True)
    computed, begun = logits_of(trained, ids), logits_of(getattr(students, kind)(None), ids)
    teacher = AutoModelForCausalLM.from_pretrained(stories260k)
    of_teacher = logits_of(teacher, ids).softmax(-1)

    def kl(logits: Tensor) -> float:
        return float((of_teacher * (of_teacher.log() - logits.log_softmax(-1))).sum(-1).mean())

    assert kl(computed) < 0.9 * kl(begun), "it learnt"
    assert not torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(run), ids), computed)
    converted = students.convert(kind, run)
    torch.testing.assert_close(logits_of(converted, ids), computed)
    converted.save_pretrained(tmp_path / "converted")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    torch.testing.assert_close(logits_of(again, ids), computed)
    # Of the run code of its own is run, of what torchao wrote none.
    found = kdcache.evaluate(kdcache.EvaluateOptions((run,), cache=cache, trust_remote_code=True))
    of_converted = kdcache.EvaluateOptions((str(tmp_path / "converted"),), cache=cache)
    assert kdcache.evaluate(of_converted).models[-1].kl == pytest.approx(found.models[-1].kl)
