"""Loss and all gradients equal plain autograd, whatever is around the output layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import further
from test_student import V, causal_batch, causal_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from kdcache.errors import UsageError
from kdcache.loss import distillation_loss
from kdcache.student import DistilledStudent
from kdcache.teacher.projection import call, logits_of


class Around(nn.Module):
    """A model around a model, as PEFT makes them: its forward names nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class PromptTuned(Around):
    """Learned vectors before the tokens of each row: the logits have more places than labels."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.prompt = nn.Parameter(torch.randn(3, model.config.hidden_size))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        embedded = self.model.get_input_embeddings()(kwargs.pop("input_ids"))
        prompt = self.prompt.expand(len(embedded), -1, -1)
        mask = kwargs.pop("attention_mask")
        mask = torch.cat([mask.new_ones(len(mask), 3), mask], 1)
        inputs = torch.cat([prompt, embedded], 1)
        return self.model(inputs_embeds=inputs, attention_mask=mask, **kwargs)


class PrefixTuned(Around):
    """Learned keys and values before those of each row."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        size = (config.num_hidden_layers, 2, 1, config.num_key_value_heads, 3, 8)
        self.prefix = nn.Parameter(torch.randn(size))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.pop("attention_mask")
        rows = len(mask)
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.prefix):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        mask = torch.cat([mask.new_ones(rows, 3), mask], 1)
        named = inspect.signature(self.model.forward).parameters
        kwargs["cache" if "cache" in named else "past_key_values"] = cache
        return self.model(*args, attention_mask=mask, **kwargs)


class LowRank(nn.Linear):
    """A linear layer with an adapter that is nothing yet."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.weight.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.down.T @ self.up.T


class EditsEmbeddings(LlamaForCausalLM):  # type: ignore[misc]
    """A user's subclass: embeddings are changed before the layers see them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shift = nn.Parameter(torch.randn(config.hidden_size))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        embedded = 1.5 * self.get_input_embeddings()(kwargs.pop("input_ids")) + self.shift
        return super().forward(*args, inputs_embeds=embedded, **kwargs)


class EditsLogits(LlamaForCausalLM):  # type: ignore[misc]
    """A user's subclass: something is done to the logits, by a parameter or without one."""

    def __init__(self, config: Any, edit: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(config)
        self.edit = edit
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output["logits"] = self.edit(self, output["logits"])
        return output


def llama(**more: Any) -> Any:
    return causal_model("llama", **more)


def edited(edit: Callable[[Any, Tensor], Tensor]) -> Callable[[], Any]:
    return lambda: EditsLogits(llama().config, edit)


class After(Around):
    """Something is done to the logits that a model gives."""

    def __init__(self, model: Any, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model)
        self.edit = edit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        output["logits"] = self.edit(output["logits"])
        return output


def named(model: Any, edit: Callable[[Tensor], Tensor], **constants: float) -> Any:
    for name, value in constants.items():
        setattr(model.config, f"logit_{name}", value)
    return After(model, edit)


def low_rank(*places: str) -> Any:
    model = llama()
    for place in places:
        parent, _, name = place.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, name, LowRank(getattr(holder, name)))
    return model


def plain(kind: str) -> Any:
    return causal_model(kind, **(SIZES if kind in ("gpt2", "opt") else {})).eval()


def biased(scale: float) -> Any:
    """Granite divides its logits; here the layer has a bias as well."""
    model = causal_model("granite", logits_scaling=1 / scale)
    model.lm_head = nn.Linear(16, V)
    return model


SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "ffn_dim": 24, "word_embed_proj_dim": 16}
KINDS = ("llama", "gpt2", "opt", "gpt_neox", "qwen2", "phi")  # with and without a bias
FUSED: dict[str, Callable[[], Any]] = {
    **{kind: partial(plain, kind) for kind in KINDS},
    "around": lambda: Around(llama()),
    "prompt tuning": lambda: PromptTuned(llama()),
    "prefix tuning": lambda: PrefixTuned(llama()),
    "edited embeddings": lambda: EditsEmbeddings(llama().config),
    "low rank": lambda: low_rank("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"),
    "nothing after": edited(lambda _, z: z.float()),
    "tied": lambda: llama(tie_word_embeddings=True),
    "scaled, with a bias": lambda: biased(0.125),
    "soft cap with a name": lambda: named(
        llama(), lambda z: 30 * torch.tanh(z / 30), soft_cap=30.0
    ),
    "scale, then soft cap": lambda: named(
        biased(0.125), lambda z: 5 * torch.tanh(z / 5), soft_cap=5.0
    ),
}
OWN_LOGITS: dict[str, Callable[[], Any]] = {
    "low rank output": lambda: low_rank("lm_head"),
    "bias that is zero": edited(lambda model, z: z + model.bias),
    "factor that is one": edited(lambda model, z: z * model.factor),
    "small constant bias": edited(lambda _, z: z + 1e-3),
    "scale without a name": edited(lambda _, z: z * 1.01),
    "soft cap": edited(lambda _, z: 30 * torch.tanh(z / 30)),
    "soft cap far away": edited(lambda _, z: 1000 * torch.tanh(z / 1000)),
    "soft cap of another name": lambda: named(
        llama(), lambda z: 30 * torch.tanh(z / 30), soft_cap=31.0
    ),
    "soft cap, then scale": lambda: named(
        llama(), lambda z: 2 * torch.tanh(z), soft_cap=1.0, scale=2.0
    ),
    "clamp": edited(lambda _, z: z.clamp(-100, 100)),
    "normalised": edited(lambda _, z: z.log_softmax(-1)),
    "another width": edited(lambda _, z: torch.cat([z, torch.zeros_like(z[..., :1])], -1)),
}


def compare(
    student: DistilledStudent, batch: dict[str, Any], divergence: str = "forward-kl"
) -> None:
    """The wrapper's loss and gradients against plain autograd on the model's own logits."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    at = batch["labels"] != -100
    logits = student.student(**inputs, use_cache=False).logits[:, -at.shape[1] :]
    want = distillation_loss(
        logits[at][:, :V], batch["labels"][at], batch["targets"], alpha=0.3, divergence=divergence
    )
    want.total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    got = student(**batch)
    got.loss.backward()
    torch.testing.assert_close(got.loss, want.total)
    torch.testing.assert_close(got.hard_loss, want.hard)
    torch.testing.assert_close(got.soft_loss, want.soft)
    for name, p in student.named_parameters():
        expected = gradients[name]
        assert (p.grad is None) == (expected is None), name
        if p.grad is not None and expected is not None:
            close = {"rtol": 2e-4, "atol": 1e-5 * float(expected.abs().max() + 1)}
            exact = {"rtol": 1e-7, "atol": 1e-9}
            how = exact if p.dtype == torch.float64 else close
            torch.testing.assert_close(p.grad, expected, **how)
    student.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("name", "fused"), [*((n, True) for n in FUSED), *((n, False) for n in OWN_LOGITS)]
)
def test_every_parameter_gets_its_gradient(name: str, fused: bool) -> None:
    torch.manual_seed(2)
    model = (FUSED | OWN_LOGITS)[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.std() < 0.1:
                parameter.mul_(8)
    student = DistilledStudent(model, "causal-lm", alpha=0.3, vocab_size=V)
    state = torch.get_rng_state()
    compare(student, causal_batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert student._projection is not None
    assert (student._projection.layer is not None) == fused
    compare(student, causal_batch("topk:3"))
    assert "forward" not in vars(model.get_output_embeddings())


CAPPED = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 0.25}
DIVERGENCES = (
    ("forward-kl", "dense"),
    ("reverse-kl", "topk:3"),
    ("reverse-kl", "dense"),
    ("jsd", "dense"),
)


@pytest.mark.parametrize(("divergence", "codec"), DIVERGENCES)
@pytest.mark.parametrize(
    ("kind", "more", "found"),
    [
        ("llama", {"vocab_size": V + 24}, (1.0, None)),
        ("granite", {"logits_scaling": 8.0}, (1 / 8, None)),
        ("cohere", {"logit_scale": 0.0625}, (0.0625, None)),
        ("gemma2", CAPPED, (1.0, 0.25)),
    ],
)
def test_every_divergence_of_padded_scaled_and_capped_logits(
    kind: str, more: Any, found: tuple[float, float | None], divergence: str, codec: str
) -> None:
    model = causal_model(kind, **more)
    how: dict[str, Any] = {"alpha": 0.3, "vocab_size": V, "divergence": divergence}
    student, batch = DistilledStudent(model, "causal-lm", **how), causal_batch(codec)
    compare(student, batch, divergence)
    projection = student._projection
    assert projection is not None
    assert (projection.scale, projection.cap) == found
    loss = student(**batch).loss
    loss.backward()
    assert not model.get_output_embeddings().weight.grad[V:].any()
    projection.cap = None
    assert (abs(student(**batch).loss - loss) > 1e-3) == (found[1] is not None)


def test_a_fused_loss_makes_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    student = DistilledStudent(llama(), "causal-lm")
    student(**causal_batch())  # which measures the layer
    monkeypatch.setattr(student.student.lm_head, "forward", lambda _: pytest.fail("made logits"))
    assert student(**causal_batch("topk:3")).loss.requires_grad


def test_a_student_measured_without_gradients_learns_its_bias() -> None:
    student = DistilledStudent(OWN_LOGITS["bias that is zero"](), "causal-lm", alpha=0.3)
    with torch.inference_mode():
        student(**causal_batch())
    compare(student, causal_batch())


def test_another_student_is_measured_anew() -> None:
    student = DistilledStudent(llama(), "causal-lm", alpha=0.3)
    compare(student, causal_batch())
    student.student = PromptTuned(student.student)
    compare(student, causal_batch())


def test_gradient_checkpointing_keeps_every_gradient() -> None:
    model = low_rank("model.layers.0.self_attn.q_proj").train()
    student = DistilledStudent(model, "causal-lm", alpha=0.3)
    student.gradient_checkpointing_enable()
    compare(student, causal_batch())
    model = EditsEmbeddings(llama().config).train()
    student = DistilledStudent(model, "causal-lm", alpha=0.3)
    student.gradient_checkpointing_enable()
    compare(student, causal_batch())


@pytest.mark.end_to_end
@pytest.mark.parametrize("whole", [True, *further(False)])
def test_a_compiled_student_gets_its_inputs(whole: bool) -> None:
    model = llama()
    if whole:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    student = DistilledStudent(model, "causal-lm", alpha=0.3)
    compare(student, causal_batch("sample:3"))


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's own
@pytest.mark.exhaustive
@pytest.mark.parametrize("codec", ["sample:3", "topk:3"])
def test_a_compiled_wrapper(codec: str) -> None:
    student = DistilledStudent(llama(), "causal-lm", alpha=0.3)
    student.compile(backend="eager")
    compare(student, causal_batch(codec))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own, of transformers
def test_peft_adapters() -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    for config in (
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        model = peft.get_peft_model(llama(), config)
        compare(DistilledStudent(model, "causal-lm", alpha=0.3), causal_batch())


class Inputs(nn.Module):
    """A classifier whose logits tell what it was given."""

    def forward(self, input_ids: Tensor, token_type_ids: Any = None, **kwargs: Any) -> Tensor:
        types = 0 if token_type_ids is None else token_type_ids.sum()
        return torch.tensor([[input_ids.sum(), types + sum(v.sum() for v in kwargs.values())]])


def test_a_forward_without_names_gets_all_inputs() -> None:
    batch = {"input_ids": torch.tensor([[3]]), "token_type_ids": torch.tensor([[7]])}
    for student in (Around.__new__(Around), torch.compile(Inputs(), backend="eager"), Inputs()):
        if isinstance(student, Around):
            nn.Module.__init__(student)
            student.model = Inputs()
        given = call(student, {**batch, "attention_mask": torch.tensor([[1]])})  # type: ignore[arg-type]
        assert logits_of(given).tolist() == [[3, 8]]


def test_logits_of_too_few_tokens_are_refused() -> None:
    student = DistilledStudent(EditsLogits(llama().config, lambda _, z: z[:, 1:]), "causal-lm")
    with pytest.raises(UsageError, match="logits of 6 tokens a row, the labels are for 7"):
        student(**causal_batch())
