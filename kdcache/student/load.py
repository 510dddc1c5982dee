"""Students by name: what `--student` accepts, and the checks that it fits the cache.

===================  ===========================================================================
name                 student
===================  ===========================================================================
folder or hub id     a Hugging Face model with its weights; a plain encoder gets a new
                     classifier head; also what `save_pretrained` of any student here wrote;
                     an adapter is merged into its base
``CONFIG.json``      a Hugging Face (or bilstm) architecture, randomly initialised
``bilstm``           the built-in classifier, with words or the teacher's tokens
``module:function``  the result of ``function(info)``: a `torch.nn.Module` whose forward
                     takes the batch's input tensors and returns logits; a Hugging Face model,
                     changed or not (fake-quantised weights), is saved as one
===================  ===========================================================================

Random weights come from `StudentInfo.seed` alone; the global random state is left unchanged. All
weights of a student begun from another (`--init-from`) are the earlier one's, which has the same
shape and reads the same tokens; anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from kdcache.errors import UsageError, reason_of
from kdcache.lora import ADAPTER_CONFIG, PEFT_TASKS, Lora, is_adapted
from kdcache.models import BILSTM
from kdcache.pretrained import UnreadableError, unreadable, warn_of_left_out
from kdcache.student.factory import from_factory, is_factory, saved_factory
from kdcache.student.one_answer import begin_at
from kdcache.student.tokens import (
    HfTokenize,
    StudentInfo,
    WordTokenize,
    label_config,
    student_tokenize,
    tokenizer_of,
)
from kdcache.tasks import TASKS, could_be, task_of
from kdcache.teacher import TeacherFiles, auto_class, quiet_transformers
from kdcache.teacher.load import name_outputs
from kdcache.teacher.quirks import forget_lengths
from kdcache.teacher.trust import check_config, factory_of

if TYPE_CHECKING:
    from kdcache.teacher.adapter import AdapterFolder

# A student may pad its vocabulary, as models do for the speed of their last product, but not by
# whole vocabularies.
_MOST_PADDING = 1024
_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_student(
    name: str,
    info: StudentInfo | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    embeddings: str | Path | None = None,
    lora: Lora | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Make or load a student and check that it fits.

    Args:
        name: see the module.
        info: the cache's side. A student that was trained, such as a run's folder, needs none.
        options: only for bilstm: fields of `BiLstmConfig`, and `tokenizer` ("words" or "teacher"),
            `min_count`, `max_words`, `lower` of its vocabulary.
        embeddings: only for bilstm with words: GloVe or word2vec text file, .gz too.
        lora: give a Hugging Face student this adapter, and train that alone.
        dtype: of the weights of Hugging Face students (training in float16 weights does not
            converge).
        trust_remote_code: run code that a folder or hub repository brings or names.

    Returns:
        The student, in training mode; loaded without `info`, in evaluation mode.

    Raises:
        UsageError: no such student, or one that does not fit the cache.
    """
    raw = _config_file(name)
    trained = info is None
    if info is None:
        if raw is None and (Path(name) / ADAPTER_CONFIG).is_file():
            files = TeacherFiles.find(name, role="student", trust_remote_code=trust_remote_code)
            info = StudentInfo.saved(name, files.raw_config)
        else:
            info = StudentInfo.saved(name, raw or {})
    kind = None if raw is None else raw.get("model_type")
    made_by = None if raw is None else factory_of(raw)
    if raw is not None:
        check_config(f"student {name}", raw, trust_remote_code=trust_remote_code)
    new_bilstm = name == "bilstm" or (kind == BILSTM and not Path(name).is_dir())
    if lora is not None and (kind == BILSTM or made_by or not is_model(name)):
        raise UsageError(
            f"--lora adapts Hugging Face models with their weights, and student {name} is none. "
            "Name a folder or a hub id, or train without --lora."
        )
    if (options or embeddings) and not new_bilstm:
        raise UsageError(
            f"sizes and embeddings are options of a new bilstm, not of student {name}."
        )
    if lora is not None and info.task not in PEFT_TASKS:
        raise UsageError(f"--lora is for {', '.join(PEFT_TASKS)}; train {info.task} without it.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(info.seed)
        if new_bilstm:
            from kdcache.student.bilstm import make_bilstm

            sizes = {**(raw or {}), **(options or {})}
            student: nn.Module = make_bilstm(sizes, embeddings, info)
        elif made_by is not None:
            student = saved_factory(Path(name), made_by, info)
        elif is_factory(name):
            student = from_factory(name, info)
        elif raw is not None and Path(name).is_file():
            student = _from_config(name, raw, info, dtype, trust_remote_code)
        else:
            student = _from_weights(name, info, dtype, trust_remote_code, lora)
    begin_at(student, None if is_model(name) else info.mean)
    _check(student, name, info, trust_remote_code)
    forget_lengths(student, to_train=not trained)
    name_outputs(student)
    return student.train(not trained)


def is_model(name: str) -> bool:
    """Whether a student's name is that of a folder or a hub id, which has weights."""
    return not (name == "bilstm" or Path(name).is_file() or is_factory(name))


def _config_file(name: str) -> dict[str, Any] | None:
    """The JSON of a config file, or of a folder's config.json; None if there is none."""
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if (Path(name) / ADAPTER_CONFIG).is_file():
        return None
    if path.suffix != ".json" or not path.is_file():
        if name.endswith(".json"):
            raise UsageError(f"student {name}: no such file.")
        return None
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"student {path} is not JSON: {error}.") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise UsageError(
            f'student {path} names no architecture: it needs a "model_type", such as "llama" or '
            f'"{BILSTM}".'
        )
    return raw


def _check_order(name: str, names: tuple[str, ...], info: StudentInfo) -> None:
    """Refuse a classifier that would have to begin with its classes confused."""
    cached = info.label_names or ()
    if names != cached and sorted(names) == sorted(cached):
        raise UsageError(
            f"student {name} has the classes {', '.join(names)} in this order, the cache "
            f"{', '.join(cached)}. Give the encoder before its fine-tuning, or reorder its head "
            "and its id2label."
        )


def _check_head(name: str, raw: Mapping[str, Any], task: str) -> None:
    """Refuse a model whose head would be taken over, though it means something else."""
    own = task_of(raw)
    if own is not None and TASKS[own].auto == TASKS[task].auto:
        raise UsageError(
            f"student {name} is a {TASKS[own].noun}, the cache is for {task}. Give the encoder "
            f"before its fine-tuning, or a {TASKS[task].noun}."
        )


def _from_config(
    name: str, raw: Mapping[str, Any], info: StudentInfo, dtype: torch.dtype, trust: bool
) -> nn.Module:
    given = {
        k: v
        for k, v in raw.items()
        if k not in ("model_type", "architectures", "transformers_version")
    }
    if not TASKS[info.task].over_ids:
        if given.pop("num_labels", info.num_labels) != info.num_labels:
            raise UsageError(
                f"student {name} has {raw['num_labels']} classes, the cache has "
                f"{info.num_labels}. Drop num_labels."
            )
        given |= label_config(info)
    given.setdefault("vocab_size", info.vocab_size)
    # The defaults of an architecture are the ids of someone else's tokenizer.
    for key, value in (
        ("pad_token_id", info.pad_id),
        ("bos_token_id", info.bos_id),
        ("eos_token_id", info.eos_id),
    ):
        given.setdefault(key, value)
    if TASKS[info.task].source:
        if info.decoder_start is not None and info.decoder_start >= 0:  # as the teacher's begins
            given.setdefault("decoder_start_token_id", info.decoder_start)
        # What an architecture generates first or last by default is an id of someone else, too.
        given.setdefault("forced_eos_token_id", None)
    try:
        with unreadable():
            config = AutoConfig.for_model(raw["model_type"], **given)
            kind = auto_class(info.task, config)
            student = kind.from_config(config, dtype=dtype, trust_remote_code=trust)
    except UnreadableError as error:
        raise UsageError(f"student {name}: not a {info.task} architecture ({error}).") from error
    return student  # type: ignore[no-any-return]


def lost_of_encoder(model: Any, missing: Iterable[str]) -> list[str]:
    """The weights that no files may lack: a plain encoder gets a new head, and a new pooler if it
    has none; nothing else may be random.

    Args:
        model: an encoder, with or without a head.
        missing: names of weights that were not loaded.
    """
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    return sorted(key for key in missing if key.startswith(body) and "pooler" not in key)


def _from_weights(
    name: str, info: StudentInfo, dtype: torch.dtype, trust: bool, lora: Lora | None
) -> nn.Module:
    files = TeacherFiles.find(name, role="student", trust_remote_code=trust)
    if lora is not None:
        from kdcache.student.adapter import refuse_second, with_lora

        refuse_second(name, files)
    trained = True
    try:
        config = files.config
        if not TASKS[info.task].over_ids:
            trained = could_be(files.raw_config, info.task)
            if not trained:
                _check_head(name, files.raw_config, info.task)
            if trained and config.num_labels != info.num_labels:
                raise UsageError(
                    f"student {name} has {config.num_labels} classes, the cache has "
                    f"{info.num_labels}. Give the encoder before its fine-tuning, or a student "
                    "fine-tuned on the same classes."
                )
            if trained and info.label_names is not None:
                _check_order(name, files.label_names, info)
            if getattr(config, "pad_token_id", None) is None:
                config.pad_token_id = info.pad_id
            for key, value in label_config(info).items():
                setattr(config, key, value)
        with unreadable(), quiet_transformers():  # what is missing is judged below
            student, found = auto_class(info.task, config).from_pretrained(
                files.whole,
                config=config,
                dtype=dtype,
                trust_remote_code=trust,
                use_safetensors=True,
                output_loading_info=True,
            )
    except ImportError as error:
        raise UsageError(
            f"{files.who} needs a library that is missing: {reason_of(error)}."
        ) from error
    except (OSError, UnreadableError) as error:
        raise UsageError(
            f"student {name} cannot be loaded as a {info.task} model ({reason_of(error)})."
        ) from error
    warn_of_left_out(files.who, student, found["unexpected_keys"])
    if lora is None:
        _check_trainable(name, student)
    kept = student.config
    if not trust and type(kept) not in auto_class(info.task, kept)._model_mapping:
        raise UsageError(
            f"student {name} would be saved as {kept.model_type}, its text model, which "
            "transformers could not load again. Name another student."
        )
    brought = {} if files.adapter is None else files.adapter.shapes()
    missing = set(found["missing_keys"]) - brought.keys()
    lost = sorted(missing) if trained else lost_of_encoder(student, missing)
    if lost:
        raise UsageError(
            f"student {name} has no weights for {', '.join(lost[:3])}, and a {info.task} model "
            "needs them. Name another student, or its config.json for random weights."
        )
    for weight in student.parameters():  # safetensors writes no stretches of larger tensors
        if weight.untyped_storage().nbytes() > weight.nbytes:
            weight.data = weight.data.clone()
    begin_at(student, None if trained else info.mean)
    if lora is not None:
        return with_lora(student, lora, name, files, info, new=found["missing_keys"])
    if files.adapter is not None:
        student = files.merged(student).requires_grad_(True)
    return student  # type: ignore[no-any-return]


def _check_trainable(name: str, student: Any) -> None:
    """Refuse a folder of quantised weights, which no gradient changes."""
    if getattr(student.config, "quantization_config", None) is None:
        return
    for key, values in student.state_dict().items():
        plain = type(values) in (Tensor, nn.Parameter) and values.dtype in _TRAINABLE
        if values.ndim > 1 and not plain:
            raise UsageError(
                f"student {name} has quantised weights ({key}), which training cannot change. Name "
                "a function, module:function, that loads them as floats and quantises them in "
                "every forward pass, or train an adapter beside them with --lora."
            )


def _check(student: nn.Module, name: str, info: StudentInfo, trust: bool) -> None:
    """Compare sizes (and for language models the tokenizer itself) with the cache's."""
    if not TASKS[info.task].over_ids:
        labels = getattr(getattr(student, "config", None), "num_labels", info.num_labels)
        if labels != info.num_labels:
            raise UsageError(
                f"student {name} has {labels} classes, the cache has {info.num_labels}."
            )
        embedded = _rows(student, "get_input_embeddings")
        if (
            embedded is not None
            and student_tokenize(student, name, info, trust_remote_code=trust) is None
            and embedded < info.vocab_size
        ):
            raise UsageError(
                f"student {name} embeds {embedded} ids, the cache's tokenizer has "
                f"{info.vocab_size}. Put the student's own tokenizer into its folder, or use one "
                "with the teacher's vocabulary."
            )
        return
    size = _rows(student, "get_output_embeddings")
    if info.across:
        _check_own(name, size, info, trust)
        return
    cure = (
        f"A {info.task} student must have the teacher's vocabulary: take one of its family, or a "
        "config.json with this vocab_size."
    )
    if TASKS[info.task].causal and not TASKS[info.task].source:
        cure += " To train it with its own tokens, add --cross-tokenizer likelihood or hybrid."
    if size is not None and not info.vocab_size <= size < info.vocab_size + _MOST_PADDING:
        raise UsageError(
            f"student {name} has a vocabulary of {size}, the cache's is {info.vocab_size}. {cure}"
        )
    tokenizer = tokenizer_of(name, trust)
    if tokenizer is not None and info.tokenizer is not None:
        differ = _differ(info.tokenizer, tokenizer)
        if differ:
            own, cached = (len(x.get_vocab()) for x in (tokenizer, info.tokenizer))
            raise UsageError(
                f"student {name} has another vocabulary ({own} tokens, the cache's "
                f"tokenizer {cached}; {differ} ids mean different tokens). {cure}"
            )


def _check_own(name: str, size: int | None, info: StudentInfo, trust: bool) -> None:
    """Compare a student's weights with its own tokenizer; how far it pads them is its affair."""
    if size is not None and size < info.vocab_size:
        raise UsageError(
            f"student {name} has a vocabulary of {size}, its tokenizer one of {info.vocab_size}. "
            "Give the tokenizer that it was trained with."
        )
    tokenizer = tokenizer_of(name, trust)
    differ = 0 if tokenizer is None else _differ(info.tokenizer, tokenizer)
    if differ:
        raise UsageError(
            f"student {name} was trained with another tokenizer than --student-tokenizer: {differ} "
            "ids mean different tokens. Leave --student-tokenizer out, or begin with random "
            "weights: a config.json."
        )


def _differ(one: Any, other: Any) -> int:
    """Ids that mean different tokens in two tokenizers."""
    ours, theirs = ({i: t for t, i in x.get_vocab().items()} for x in (one, other))
    return sum(ours[i] != theirs[i] for i in ours.keys() & theirs.keys())


def _rows(student: nn.Module, getter: str) -> int | None:
    """Rows of an embedding matrix of a Hugging Face model."""
    module = None
    with suppress(NotImplementedError):  # CANINE
        module = getattr(student, getter, lambda: None)()
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else None


def begin_from(
    student: Any,
    tokenize: Any,
    source: str,
    info: StudentInfo,
    *,
    lora: Lora | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Give a student the weights of an earlier one.

    Args:
        tokenize: what `student_tokenize` gives for the student.
        source: folder or hub id of the earlier one, such as a run's.
        lora: the adapter that is trained, whose weights are then taken from an earlier adapter.

    Raises:
        UsageError: it has another shape, another tokenizer, or an adapter on another base.
    """
    who = f"--init-from {source}"
    files = TeacherFiles.find(source, role="run", trust_remote_code=trust_remote_code)
    if lora is not None and is_adapted(student):
        if files.adapter is None:
            raise UsageError(
                f"{who} is a whole model, and --lora trains an adapter. Name it as --student."
            )
        _check_adapter(who, files.adapter, lora, student.kdcache_adapter["base_sha256"])
        files.adapter.fill(student)
        return
    other = load_student(source, info, trust_remote_code=trust_remote_code)
    theirs = student_tokenize(other, source, info, trust_remote_code=trust_remote_code)
    if _ids(theirs) != _ids(tokenize):
        raise UsageError(
            f"{who} reads other tokens than the student. Name it as --student, which keeps its own "
            "tokenizer."
        )
    try:
        student.load_state_dict(other.state_dict())
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UsageError(
            f"{who} has another shape than the student: {' '.join(lines[:1])[:300].rstrip('.')}. "
            "Name it as --student to keep its shape."
        ) from error


def _check_adapter(who: str, adapter: AdapterFolder, lora: Lora, base_sha256: str) -> None:
    config = adapter.config
    adapter.check_base(base_sha256)
    plain = not any(config.get(name) for name in ("use_rslora", "use_dora", "rank_pattern"))
    same = (config.get("r"), config.get("lora_alpha")) == (lora.r, lora.alpha)
    if config.get("peft_type") != "LORA" or not plain or not same:
        raise UsageError(
            f"{who} is an adapter of r={config.get('r')}, alpha={config.get('lora_alpha')}"
            f"{'' if plain else ' and another kind'}, the new one is {lora}. Give the same --lora, "
            "or name it as --student without --lora, which merges it."
        )


def _ids(tokenize: Any) -> Any:
    """What a tokenizer makes of words; None for the cache's own."""
    own = isinstance(tokenize, HfTokenize | WordTokenize)
    return tokenize.tokenizer.get_vocab() if own else None
