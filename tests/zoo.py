"""A zoo: the architectures of transformers, each made tiny from its configuration.

`SIZES` are the sizes that most configurations share; a species names only what it needs besides.
Weights are drawn wide, biases and norms are moved from 0 and 1, so that one that is left out moves
the logits. Dropout is off, so that a training step can be computed again.

`make test` takes those that are `TYPICAL` of a mechanism, `make test-all` every one (`forms`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from task_examples import with_telling_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 300
PAD = 1
CLASSES = ("bad", "neutral", "good")

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embedding_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "n_inner", "d_ff"), 64),
    **dict.fromkeys(("hidden_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    "pad_token_id": PAD,
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "shared_expert_intermediate_size": 32,
}


@dataclass(frozen=True)
class Species:
    """One tiny model.

    Attributes:
        model_type: of transformers.
        what: what sets it apart from others of its type.
        changes: to its configuration, besides `SIZES`; None leaves a size at its default.
    """

    model_type: str
    what: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join(filter(None, (self.model_type, self.what.replace(" ", "-"))))

    def config(self, **more: Any) -> Any:
        """The configuration."""
        kind = CONFIG_MAPPING[self.model_type]
        default, given = kind(), {}
        for name, value in SIZES.items():
            try:
                known = hasattr(default, name)
            except AttributeError:  # it differs between layers
                known = False
            if known:
                given[name] = value
        given |= {
            name: 0.0
            for name, value in vars(default).items()
            if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float)
        }
        given |= {**self.changes, **more}
        return kind(**{name: value for name, value in given.items() if value is not None})

    def save(self, folder: Path, auto: Any, tokenizer: Any, *, seed: int = 0, **more: Any) -> Path:
        """Save random weights and the tokenizer.

        Args:
            folder: where.
            auto: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.
            tokenizer: of `VOCABULARY` ids.
            seed: of the weights.
            more: changes to the configuration.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = with_telling_weights(auto.from_config(self.config(**more)).eval())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


def make(model_type: str, what: str = "", **changes: Any) -> Species:
    """A species."""
    return Species(model_type, what, changes)


def _words(text: str) -> list[str]:
    return text.split()


_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT = {
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
_PROPHETNET = {
    "num_hidden_layers": None,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
}

_SPECIAL = [
    make("falcon", head_dim=None),
    make("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=8),
    make("jamba", **_JAMBA),
    make("qwen3_next", **_LINEAR),
    make("qwen3_5_text", **_LINEAR),
    make("deepseek_v3", **_LATENT, **_GROUPS),
]
_DECODERS = _words(
    """
    arcee biogpt bloom ctrl diffllama doge exaone4 gemma gemma2 gemma3_text glm glm4 gpt2
    gpt_bigcode gpt_neox gpt_oss gptj helium hunyuan_v1_dense hunyuan_v1_moe jetmoe llama minimax
    ministral ministral3 mistral mixtral modernbert-decoder mpt nemotron olmo olmo2 olmo3
    openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
    stablelm starcoder2
    """
)
_LANGUAGE_MODELS = _words(
    """
    afmoe apertus aria_text bart beam bigbird_pegasus bitnet blenderbot codegen cohere cohere2
    cohere2_moe cwm ernie4_5 ernie4_5_moe exaone_moe falcon_mamba flex_olmo flint
    glm4_moe gpt_neox_japanese granite granite_swa granitemoe granitemoe_swa granitemoeshared
    hrm_text hy_v3 hyperclovax inkling_text jais2 kolibri1 laguna lara_mini lfm2 llama4_text mamba
    mbart mellum mimo_v2_flash minimax_m2 ministral moshi mvp nanochat olmoe pegasus plbart rwkv
    solar_open trocr vaultgemma whisper xglm
    """
)
_ENCODERS = _words(
    """
    albert bert big_bird camembert data2vec-text deberta deberta-v2 distilbert electra ernie esm
    eurobert flaubert gte ibert jina_embeddings_v3 layoutlm megatron-bert modernbert
    mpnet mra nomic_bert rembert roberta roberta-prelayernorm roformer squeezebert tapas ultrabert
    xlm xlm-roberta xlm-roberta-xl
    """
)

CAUSAL = [
    *map(make, dict.fromkeys(_DECODERS + _LANGUAGE_MODELS)),
    *_SPECIAL,
    make("bamba", attn_layer_indices=[1], **_MAMBA),
    make("falcon_h1", mamba_d_ssm=64, **_MAMBA),
    make("granitemoehybrid", layer_types=["mamba", "attention"], **_MAMBA),
    make("mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16),
    make("qwen3_5_moe_text", **_LINEAR),
    make("olmo_hybrid", layer_types=["linear_attention", "full_attention"]),
    make("deepseek_v2", **_LATENT, **_GROUPS),
    make("glm4_moe_lite", **_LATENT),
    make("minicpm3", **_LATENT),
    make("youtu", **_LATENT),
    make("lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1),
    make("dots1", n_shared_experts=1, **_GROUPS),
    make("zaya", num_experts_per_tok=1),
    # Encoders whose configuration makes decoders of them.
    *(make(n, "decoder", is_decoder=True) for n in ("bert", "electra", "roberta", "roformer")),
    *(make(n, "decoder", is_decoder=True) for n in ("megatron-bert", "xlm-roberta-xl")),
    # What an architecture may do besides.
    make("bloom", "residual", apply_residual_connection_post_layernorm=True),
    make("cohere", "scaled", logit_scale=0.25),
    make("falcon", "alibi", head_dim=None, alibi=True),
    make("falcon", "sequential", head_dim=None, parallel_attn=False, bias=True),
    make("gemma2", "strong capping", final_logit_softcapping=2.0, attn_logit_softcapping=2.0),
    make("gpt2", "scaled attention", scale_attn_by_inverse_layer_idx=True),
    make("gpt_neox", "sequential", use_parallel_residual=False),
    make("gptj", "untied", tie_word_embeddings=False),
    make("granite", "scaled", logits_scaling=8.0, embedding_multiplier=12.0),
    make("llama", "biases", attention_bias=True, mlp_bias=True),
    make("llama", "padded", vocab_size=320),
    make("llama", "tied", tie_word_embeddings=True),
    make("mistral", "narrow window", sliding_window=3),
    make("mpt", "no alibi", attn_config={"alibi": False}),
    make("opt", "post norm", do_layer_norm_before=False),
    make("opt", "projection", word_embed_proj_dim=16),
    make("stablelm", "parallel", use_parallel_residual=True, use_qkv_bias=True),
]

CLASSIFIERS = [
    *map(make, _ENCODERS + _DECODERS),
    *_SPECIAL,
    *map(make, _words("bart mt5")),
    make("llama", "padding of its own", pad_token_id=7),
    make("longformer", attention_window=8),
    make("mobilebert", initializer_range=0.02),
]

HEADS = [*map(make, ("distilbert", "roberta", "deberta-v2", "bart", "gpt2")), make("llama")]
"""Models of whole texts whose answers are labels by themselves, or a score."""

TAGGERS = [
    *map(
        make,
        _words(
            """
            albert bert big_bird bloom camembert data2vec-text deberta deberta-v2 distilbert electra
            ernie esm flaubert gpt2 gpt_neox ibert layoutlm megatron-bert mistral modernbert mpnet
            mra qwen2 qwen3 rembert roberta roberta-prelayernorm roformer squeezebert stablelm xlm
            xlm-roberta xlm-roberta-xl
            """
        ),
    ),
    make("llama", "padding of its own", pad_token_id=7),
    make("mobilebert", initializer_range=0.02),
]
"""Token classifiers: encoders, and decoders whose head sees what is before a word."""

_MASKED = _words(
    """
    albert bert big_bird camembert data2vec-text deberta deberta-v2 distilbert electra ernie esm
    eurobert flaubert gte ibert jina_embeddings_v3 layoutlm megatron-bert modernbert mpnet
    nomic_bert rembert roberta roberta-prelayernorm roformer squeezebert tapas ultrabert xlm
    xlm-roberta xlm-roberta-xl
    """
)
MASKED = [
    *map(make, _MASKED),
    make("bert", "untied", tie_word_embeddings=False),
    make("longformer", attention_window=8),
    make("mobilebert", initializer_range=0.02, embedding_size=16),
    make("roberta", "padded", vocab_size=320),
]
"""Masked language models; `mra` computes nothing without its CUDA kernels."""

_TEXT = {
    name: SIZES[name]
    for name in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
        *("initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"),
    )
}
_EYES = {
    **dict.fromkeys(("hidden_size", "intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "vision_output_dim", "projector_input_dim"), 32),
    "projector_output_dim": 32,
    "image_size": 28,
    "patch_size": 14,
}


def _seeing(
    model_type: str,
    text: str = "",
    eyes: str = "",
    *,
    of_text: dict[str, Any] | None = None,
    of_eyes: dict[str, Any] | None = None,
    **changes: Any,
) -> Species:
    """A model that reads images, too, which are none of its ids."""
    names = ("text_config", text, _TEXT, of_text), ("vision_config", eyes, _EYES, of_eyes)
    parts = {
        part: {**({"model_type": kind} if kind else {}), **sizes, **(more or {})}
        for part, kind, sizes, more in names
    }
    return Whole(model_type, changes={**parts, **changes})


class Whole(Species):
    """One whose configuration is of parts, with the sizes in each."""

    def config(self, **more: Any) -> Any:
        return CONFIG_MAPPING[self.model_type](**self.changes, **more)


_SECTIONS = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
SEEING = [
    _seeing("gemma3", eyes="siglip_vision_model"),
    _seeing("glm4v", of_text=_SECTIONS),
    _seeing("idefics3", "llama", scale_factor=2, pad_token_id=PAD),
    _seeing("internvl", "qwen2", of_eyes={"image_size": [28, 28], "patch_size": [14, 14]}),
    _seeing(
        "llama4",
        of_text={"intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    _seeing("llava", "llama", "clip_vision_model"),
    _seeing("mistral3", "mistral", "pixtral"),
    _seeing("paligemma", "gemma2", "siglip_vision_model"),
    _seeing("qwen2_5_vl", of_text=_SECTIONS),
    _seeing("qwen3_5", of_text=_LINEAR),
    _seeing("qwen3_vl", of_text=_SECTIONS, of_eyes={"deepstack_visual_indexes": [0]}),
]
"""Language models that read images besides."""
MLLAMA = _seeing(
    "mllama",
    of_text={"cross_attention_layers": [1]},
    of_eyes={
        "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    },
)
"""One whose text model transformers loads from the whole, and not by itself."""
BLIP2 = _seeing(
    "blip-2",
    "opt",
    qformer_config={**_EYES, "encoder_hidden_size": 16},
)
"""One that reads no text without an image."""

SEQ2SEQ = [
    *(
        make(name, decoder_start_token_id=2)
        for name in _words(
            """
            bart bigbird_pegasus blenderbot blenderbot-small longt5 m2m_100 marian mbart mt5 mvp
            nllb-moe pegasus pegasus_x plbart seamless_m4t switch_transformers t5 umt5
            """
        )
    ),
    make(
        "led",
        max_encoder_position_embeddings=128,
        max_decoder_position_embeddings=128,
        attention_window=8,
        decoder_start_token_id=2,
    ),
    make("prophetnet", decoder_start_token_id=2, **_PROPHETNET),
    make("t5", "untied", tie_word_embeddings=False, decoder_start_token_id=2),
    make("bart", "padded", vocab_size=320, decoder_start_token_id=2),
]
"""Sequence-to-sequence models; `fsmt` makes no decoder input of labels, and is refused."""

UNPADDED = [make("convbert"), make("fnet"), make("nystromformer"), make("yoso")]
"""Classifiers whose logits move with the padding of their batch."""

BIDIRECTIONAL = [*map(make, ("bert", "bert-generation", "big_bird", "rembert", "roberta", "xlm"))]
"""What `AutoModelForCausalLM` loads and is none."""

TYPICAL = {
    "causal-lm": _words(
        """
        llama-padded llama-tied gptj-untied gpt_neo bloom opt-projection mistral-narrow-window
        mixtral deepseek_v3 qwen3_next rwkv jamba cohere-scaled gemma2-strong-capping biogpt
        bigbird_pegasus whisper bert-decoder
        """
    ),
    "sequence-classification": _words(
        """
        distilbert roberta deberta-v2 modernbert xlm big_bird llama-padding-of-its-own qwen3_next
        bart convbert canine
        """
    ),
    "token-classification": _words("deberta-v2 gpt2 llama-padding-of-its-own convbert"),
    "masked-lm": _words("albert bert-untied deberta-v2 electra roberta-padded longformer"),
    "multi-label-classification": _words("roberta"),
    "regression": _words("bart"),
    "seq2seq-lm": _words("t5 t5-untied bart-padded marian led prophetnet"),
    "images": _words("llama4 qwen2_5_vl"),
}
"""One architecture or more for each way in which models differ, by the task that they have: output
layers (tied, untied, biased, padded, scaled, capped, projected), positions (learnt, from an offset,
rotary, slopes, none), attention (windows, blocks, chunks, latent, linear), states instead of it,
experts, decoders of other models, and what padding does."""


def forms(species: Iterable[Species], task: str) -> list[Any]:
    """Parameters of a test: what is typical always, the rest where every form is asked for."""
    rest = pytest.mark.exhaustive
    return [
        pytest.param(one, id=str(one), marks=() if str(one) in TYPICAL[task] else rest)
        for one in species
    ]


ABSENT = {
    "canine": "reads characters, with a tokenizer of its own",
    "reformer": "its backward pass needs the training mode",
    "cpmant": "a language model that reads its prompt in both directions: refused like the masked",
    "deepseek_v4 glm_moe_dsa hy_v4 longcat_flash minimax_m3_vl_text nemotron_h": "0.2 M to 12 M "
    "weights for states and experts that no shared size reaches",
    "axk1 axk2 bailing_hybrid deepseek_v32 dory kimi_linear lfm3 sarvam_mla xlstm zamba zamba2 "
    "recurrent_gemma cohere_compass_text mistral4 dbrx": "the shared sizes do not fit together",
    "blt dots3_note emu3 fuyu gemma3 gemma4 git got_ocr2 llama4 luke mllama modernvbert perceiver "
    "phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp t5gemma t5gemma2 ultravbert": "parts besides "
    "the text model, or tables, of hundreds of megabytes",
    "gemma3n gemma3n_text gemma4_text layoutlmv2": "other libraries, or tables of 134 M weights",
    "funnel layoutlmv3 lilt markuplm musicgen prophetnet roc_bert xlnet xmod": "inputs besides "
    "ids, or sizes by other names",
    "exaone gpt-sw3 internlm3 iquestcoder sarvam_moe": "another's architecture under its own name",
}
"""What is not here, and why."""
