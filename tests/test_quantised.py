"""Students with fake-quantised weights: the loss sees what they compute, and what is saved is what
their quantiser's tools convert. `tests/real_trainers/test_torchao.py` has a real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fake_quantiser import convert, fake, load, prepare, save
from test_projection import compare
from test_student import LM, SIZES, causal_batch, causal_model
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM

import kdcache
from kdcache.cache import Cache
from kdcache.errors import UsageError
from kdcache.student import DistilledStudent, load_student
from kdcache.teacher.trust import factory_of

STUDENTS = """
import fake_quantiser
from transformers import AutoModelForCausalLM

def int4(info):
    return fake_quantiser.prepare(AutoModelForCausalLM.from_pretrained({teacher!r}))

def plain(info):
    return AutoModelForCausalLM.from_pretrained({teacher!r})
"""

OF_TINY = replace(LM, vocab_size=300)


@pytest.fixture
def students(tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with students that begin as the tiny teacher."""
    name = f"quantised_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(STUDENTS.format(teacher=str(tiny_lm)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def logits_of(model: Any, cache: str) -> Tensor:
    data = Cache.open(cache).read(0)
    ids = torch.from_numpy(data.input_ids[data.offsets[0] : data.offsets[1]]).long()[None]
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits
    return found


def test_a_fake_quantised_student_is_trained_converted_and_read_again(
    students: str, lm_caches: dict[str, str], tmp_path: Path
) -> None:
    """The whole way: train, evaluate, convert with the quantiser's tool, and refuse the rest."""
    cache, run = lm_caches["topk:8"], str(tmp_path / "run")
    options = kdcache.TrainOptions(
        cache=(cache,), student=f"{students}:int4", out=run, alpha=0.0, max_steps=6, batch_size=8,
        learning_rate=1e-3,
    )  # fmt: skip
    kdcache.train(options)
    trained = load_student(run, trust_remote_code=True)
    computed = logits_of(trained, cache)
    plain = AutoModelForCausalLM.from_pretrained(run)
    assert (logits_of(plain, cache) - computed).abs().max() > 0.1, "weights are kept in floats"
    save(convert(plain), tmp_path / "int4")
    torch.testing.assert_close(logits_of(load(tmp_path / "int4"), cache), computed)
    # Evaluation runs what was trained, and only where the code may run.
    begun = logits_of(load_student(f"{students}:int4", OF_TINY), cache)
    assert (begun - computed).abs().max() > 1e-3
    dense = lm_caches["dense"]
    found = kdcache.evaluate(
        kdcache.EvaluateOptions((run,), cache=dense, temperature=1.0, trust_remote_code=True)
    )
    kl = found.models[-1].kl
    assert kl is not None
    rounded = kdcache.evaluate(
        kdcache.EvaluateOptions((str(_plain_copy(run, tmp_path)),), cache=dense, temperature=1.0)
    )
    assert rounded.models[-1].kl != pytest.approx(kl, rel=1e-3), "that of the floats"
    with pytest.raises(UsageError, match=r"made by the Python function quantised_.*:int4"):
        kdcache.evaluate(kdcache.EvaluateOptions((run,), cache=dense))
    with pytest.raises(UsageError, match="Convert it with the tools of its quantiser"):
        kdcache.build(
            kdcache.BuildOptions(
                teacher=(run,), corpus=(str(tmp_path / "none.jsonl"),), out=str(tmp_path / "c"),
                task="causal-lm", trust_remote_code=True, workers=0,
            )
        )  # fmt: skip


def _plain_copy(run: str, folder: Path) -> Path:
    """The trained floats as a model of their own."""
    AutoModelForCausalLM.from_pretrained(run).save_pretrained(folder / "floats")
    config = json.loads((folder / "floats" / "config.json").read_text())
    config.pop("kdcache_factory")
    (folder / "floats" / "config.json").write_text(json.dumps(config))
    return folder / "floats"


def test_what_a_quantiser_converted_is_loaded_by_it_without_the_function(
    students: str, tmp_path: Path
) -> None:
    """A run keeps no quantiser's configuration, which its floats would not fit; a converted model
    has one, and the run's key with it."""
    model = load_student(f"{students}:int4", OF_TINY)
    before = {"quant_method": "gptq", "bits": 4}
    model.config.quantization_config = before
    DistilledStudent(model, "causal-lm").save_pretrained(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "quantization_config" not in config
    assert factory_of(config) == config["kdcache_factory"]
    assert factory_of({**config, "quantization_config": before}) is None


def test_a_function_that_changes_nothing_gives_an_ordinary_folder(
    students: str, lm_caches: dict[str, str], tmp_path: Path
) -> None:
    model = load_student(f"{students}:plain", OF_TINY)
    DistilledStudent(model, "causal-lm").save_pretrained(tmp_path / "saved")
    assert "kdcache_factory" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    load_student(str(tmp_path / "saved"))


def patched(model: Any) -> None:
    """As compressed-tensors wraps a layer: its own forward, in the module itself."""
    layer = model.lm_head
    layer.forward = lambda states: nn.functional.linear(states, fake(layer.weight), layer.bias)


def swapped(model: Any) -> None:
    prepare(model, head=True)


def parametrised(model: Any) -> None:
    class Rounded(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return fake(weight)

    parametrize.register_parametrization(model.lm_head, "weight", Rounded())


def of_its_own_kind(model: Any) -> None:
    """A weight whose product with states rounds it, as quantisers' tensors do."""

    class Rounding(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is nn.functional.linear:
                weight = args[1].as_subclass(Tensor)
                return nn.functional.linear(args[0], fake(weight), *args[2:])
            return super().__torch_function__(func, types, args, kwargs or {})

    values = model.lm_head.weight.detach().clone().as_subclass(Rounding)
    model.lm_head.weight = nn.Parameter(values)


def hooked_output(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda layer, given, found: (found * 4).round() / 4)


def hooked_input(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda layer, given: (given[0] * 1.5,))


def masked(model: Any) -> None:
    prune.random_unstructured(model.lm_head, "weight", 0.5)


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (patched, False),
        (swapped, False),
        (parametrised, False),
        (of_its_own_kind, False),
        (hooked_output, False),
        (hooked_input, True),
        (masked, True),
    ],
)
def test_the_loss_sees_the_output_layer_that_the_student_uses(
    change: Callable[[Any], None], fused: bool
) -> None:
    torch.manual_seed(1)
    model = causal_model("llama")
    change(model)
    student = DistilledStudent(model, "causal-lm", alpha=0.3)
    compare(student, causal_batch())
    assert student._projection is not None
    assert (student._projection.layer is not None) == fused


def test_quantised_weights_and_missing_libraries_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="library that is missing"):
        load_student(str(tmp_path), LM)
    # What a library that is there would have made: codes where the weights were.
    loaded = convert(model)
    loaded.config.quantization_config = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    nothing = {"missing_keys": [], "unexpected_keys": []}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (loaded, nothing))
    with pytest.raises(UsageError, match=r"quantised weights \(model\.layers\.0\..*codes"):
        load_student(str(tmp_path), LM)
