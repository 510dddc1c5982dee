"""`kdcache finetune`: fine-tunes a Hugging Face encoder as the teacher of a classifier, or a
sequence-to-sequence model.

    records -> class names -> token rows -> HF Trainer -> best epoch -> folder for `build`

All of the encoder is trained, or only its last parameter tensors and the new head (Tang et al. 2019
froze all but the last four of BERT and put a ReLU layer of 192 before the classes: `train_last=4,
head_width=192`), or a low-rank adapter and the head (`lora="r=16"`), whose folder is one of PEFT.

Cost: one pass over the records for the class names, then all rows are kept as token ids in memory.
Guarantee: the folder appears whole; the same command on it again does nothing. Until then
`TEACHER.tmp` keeps a checkpoint of each epoch, from which the same command continues, to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModel,
    set_seed,
)

from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.finetune.trainer import (
    best_scores,
    files_of,
    label_names_of,
    labelled_rows,
    make_trainer,
    mean_loss,
    spec_of,
)
from kdcache.commands.interrupt import interruptible
from kdcache.commands.run_folder import METRICS_FILE, RunFolder, TrainProgress
from kdcache.errors import IncompleteError, UsageError, reason_of
from kdcache.files import (
    alone,
    clear,
    full_disk,
    local_path,
    sync_folder,
    whole_folder,
    write_json,
    write_text,
)
from kdcache.loss.metrics import are_entities
from kdcache.models import HeadedConfig
from kdcache.pretrained import UnreadableError, read_config, unreadable, warn_of_left_out
from kdcache.rows import Row
from kdcache.student.adapter import with_lora
from kdcache.student.checkpoints import (
    check_identity,
    continues,
    last_checkpoint,
    read_state,
)
from kdcache.student.load import lost_of_encoder
from kdcache.student.one_answer import OneAnswer, begin_at, little_learnt
from kdcache.student.tokens import StudentInfo, label_config
from kdcache.tasks import SEQUENCE_CLASSIFICATION, TASKS
from kdcache.teacher import TeacherFiles, auto_class, quiet_transformers
from kdcache.teacher.adapter import complete_adapter
from kdcache.teacher.headed import HeadedForSequenceClassification
from kdcache.teacher.load import set_pad_id

logger = logging.getLogger(__name__)

RESULT_FILE = "finetune.json"
_MAY_CHANGE = ("out", "logging_steps")
_LATER = {  # options that earlier versions had not
    "task": SEQUENCE_CLASSIFICATION,
    "words_column": "tokens",
    "label_tokens": "first",
    "source_column": "source",
    "target_column": "target",
    "max_source_length": None,
    "source_lang": None,
    "target_lang": None,
}


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a fine-tuning.

    Attributes:
        label_names: its classes, in the order of the logits; none of a score, and of targets.
        unlabelled: rows left out because they had no label.
        accuracy: on the evaluation corpus, 0 to 1, as all that follow; None without one.
        f1: of entities, where the classes are their tags; else of class 1
            where there are two, or the mean over classes.
        micro_f1: of several labels a text.
        average_precision: the same without a threshold, over all rows and classes.
        cross_entropy: of the tokens of targets, in nats.
        max_length: tokens of the longest row, at which `build` lets the teacher answer.
        max_source_length: likewise of a source.
        warning: where the model is hardly better than one answer for all; see `TrainResult`.
        made: False where the folder was finished before.
    """

    out: str
    label_names: tuple[str, ...]
    rows: int
    unlabelled: int
    trained: int
    parameters: int
    steps: int
    loss: float
    accuracy: float | None = None
    f1: float | None = None
    seconds: float = 0.0
    made: bool = True
    truncated: int = 0
    micro_f1: float | None = None
    average_precision: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    mse: float | None = None
    cross_entropy: float | None = None
    max_length: int | None = None
    max_source_length: int | None = None
    warning: str = ""


def finetune(
    options: FinetuneOptions,
    *,
    on_progress: Callable[[TrainProgress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> FinetuneResult:
    """Fine-tune an encoder on labelled texts.

    Args:
        on_progress: called every `logging_steps` steps and after each evaluation.
        report: takes a line about what is done before and between them.

    Raises:
        UsageError: options, corpus and model do not fit, or the folder holds something else.
        IncompleteError: interrupted, or no space left; the same command continues.
    """
    out = local_path(options.out)
    run = out.with_name(out.name + ".tmp")
    with interruptible():
        try:
            finished = _finished(options, out)
            if finished is not None:
                return finished
            with alone(run, "fine-tuning"), full_disk(run, lambda: continues(run)):
                return _finished(options, out) or _finetune(options, out, run, on_progress, report)
        except KeyboardInterrupt:
            raise IncompleteError(f"interrupted. {continues(run)}") from None


def _finetune(
    options: FinetuneOptions,
    out: Path,
    run: Path,
    on_progress: Callable[[TrainProgress], None] | None,
    report: Callable[[str], None],
) -> FinetuneResult:
    with quiet_transformers():
        report("reading the corpus")
        set_seed(options.seed)
        files = TeacherFiles.find(
            options.model, role="model", trust_remote_code=options.trust_remote_code
        )
        files.check_whole("fine-tuning")
        tokenizer, begun = files.tokenizer, files_of(options)
        names = options.label_names or label_names_of(options)
        rows, unlabelled, truncated = labelled_rows(options, options.corpus, names, files)
        spec = spec_of(options, names, files)
        tests, _, _ = labelled_rows(options, options.eval_corpus, names, files)
        _check_best(options, names, tests)
        report("loading the model")
        model = _model(options, files, names, _counted(options, names, rows, files).mean)
        if options.adapter is None:
            _freeze(model, options)
        weights = list(model.parameters())
        trained = sum(p.numel() for p in weights if p.requires_grad)
        trainer = make_trainer(options, model, tokenizer, rows, tests, run, on_progress, report)
        trainer.identity = {
            "options": {
                name: value
                for name, value in _plain(options).items()
                if name not in _MAY_CHANGE and value != _LATER.get(name, ...)
            },
            "rows": _digest(rows),
            "tests": _digest(tests),
            "model_files": begun["model"],
        }
        if options.adapter is not None:  # its checkpoints are differences from the base
            trainer.identity["base"] = model.kdcache_adapter["base_sha256"]
        resume = last_checkpoint(run)
        if resume is not None:
            state = read_state(resume, contents=True)
            trainer.before = state["seconds"]
            check_identity(state, trainer.identity, f"{resume} (delete {run} to start over)")
            report(f"resuming from {resume}")
        outcome = trainer.train(str(resume) if resume else None)
        scores = best_scores(trainer.state, options)
        warning = ""
        if tests:
            one = _counted(options, names, tests, files).figures()
            where, steps = "on the evaluation corpus", outcome.global_step
            warning = little_learnt(options.task, scores, one, where, steps)
        if warning:
            logger.warning("%s", warning.removesuffix("."))
        result = FinetuneResult(
            out=str(out),
            label_names=names,
            rows=len(rows),
            unlabelled=unlabelled,
            trained=trained,
            parameters=sum(p.numel() for p in weights),
            steps=outcome.global_step,
            loss=mean_loss(trainer.state),
            **scores,  # type: ignore[arg-type]
            seconds=trainer.seconds,
            truncated=truncated,
            max_length=spec.max_length,
            max_source_length=spec.max_source_length,
            warning=warning,
        )
        with whole_folder(run / "teacher") as folder:
            model.save_pretrained(folder)
            if options.adapter is not None:
                complete_adapter(folder, model.kdcache_adapter)
            tokenizer.save_pretrained(str(folder))
            document = {
                "options": _plain(options), "files": begun, "result": dataclasses.asdict(result)
            }  # fmt: skip
            lines = (json.dumps(line) for line in trainer.state.log_history)
            write_text(folder / METRICS_FILE, "".join(f"{line}\n" for line in lines))
            write_json(folder / RESULT_FILE, document)
    if out.is_dir():
        out.rmdir()  # known to be empty
    (run / "teacher").replace(out)
    sync_folder(out.parent)
    clear(run)
    return result


def _digest(rows: Sequence[Row]) -> str:
    """SHA-256 of what the model is trained on: ids and labels."""
    digest = hashlib.sha256()
    for row in rows:
        source = () if row.source is None else (row.source,)
        for values in (row.input_ids, row.labels, row.type_ids, *source):
            digest.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
            digest.update(b"|")
    return digest.hexdigest()


def _plain(options: FinetuneOptions) -> dict[str, Any]:
    values = dict(json.loads(json.dumps(dataclasses.asdict(options))))
    values["lora"] = None if options.adapter is None else str(options.adapter)
    return values


def _finished(options: FinetuneOptions, out: Path) -> FinetuneResult | None:
    document = RunFolder(out, RESULT_FILE, "a teacher of kdcache finetune").document()
    if document is not None:
        now, then = _plain(options), document["options"]
        changed = [
            f"{name}: {then.get(name)} -> {value}"
            for name, value in now.items()
            if then.get(name, _LATER.get(name)) != value and name not in _MAY_CHANGE
        ]
        then = document.get("files", {})
        changed += [
            f"the files of {name} have changed"
            for name, value in files_of(options).items()
            if None not in (value, then.get(name)) and value != then[name]
        ]
        if changed:
            raise UsageError(
                f"{out} was made with other options:\n  "
                + "\n  ".join(changed)
                + "\nUse the same options, or another --out."
            )
        result = {**document["result"], "out": str(out), "made": False}
        result["label_names"] = tuple(result["label_names"])
        return FinetuneResult(**result)
    return None


def _check_best(options: FinetuneOptions, names: Sequence[str], tests: Sequence[Row]) -> None:
    """Refuse rows on which the figure that selects the best epoch is never defined."""
    task = TASKS[options.task]
    lacking, figure = "", ""
    if task.answers == "labels" and not any((row.labels == 1).any() for row in tests):
        lacking, figure = "a class", "average precision"
    if task.words and are_entities(names):
        outside = [i for i, name in enumerate(names) if name == "O"]
        tags = (row.labels[row.labels >= 0] for row in tests)
        if all(np.isin(of_row, outside).all() for of_row in tags):
            lacking, figure = "an entity", "F1"
    if lacking and tests:
        raise UsageError(
            f"no row of --eval-corpus {' '.join(options.eval_corpus)} has {lacking}, so its "
            f"{figure}, which selects the best epoch, is not defined. Name rows that have some."
        )


def _counted(
    options: FinetuneOptions, names: Sequence[str], rows: Sequence[Row], files: TeacherFiles
) -> OneAnswer:
    """The labels of rows."""
    outputs = files.vocab_size(options.task) if TASKS[options.task].over_ids else len(names)
    found = OneAnswer(options.task, outputs, names)
    for row in rows:
        found.add(row.labels)
    return found


def _model(
    options: FinetuneOptions, files: TeacherFiles, names: tuple[str, ...], mean: float
) -> Any:
    trust, task = options.trust_remote_code, TASKS[options.task]
    info = StudentInfo(options.task, 0, len(names) or 1, names or None)
    classes = label_config(info) | ({"problem_type": task.problem} if task.problem else {})
    try:
        config = read_config(files.folder, trust_remote_code=trust, **classes)
        set_pad_id(config, files)
        kind = AutoModel if options.head_width else auto_class(options.task, config)
        with unreadable():
            model, found = kind.from_pretrained(
                files.folder,
                output_loading_info=True,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=trust,
                # A head of other classes is replaced by a new one.
                ignore_mismatched_sizes=not task.over_ids,
            )
    except (OSError, UnreadableError) as error:
        raise UsageError(
            f"{files.who} cannot be loaded as "
            f"{'a ' + task.noun if task.over_ids else 'an encoder'} (safetensors weights only): "
            f"{reason_of(error)}."
        ) from error
    warn_of_left_out(files.who, model, found["unexpected_keys"])
    if task.over_ids and found["missing_keys"]:
        raise UsageError(
            f"{files.who} has no weights for {min(found['missing_keys'])}: it is not a "
            f"{task.noun}. Name another."
        )
    new = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    if not task.over_ids and (lost := lost_of_encoder(model, new)):
        raise UsageError(
            f"{files.who} has no weights of the right shape for {', '.join(lost[:3])}: "
            "its encoder would begin at random. Name another."
        )
    begin_at(model, mean if new else None)
    if options.adapter is not None:
        pad = getattr(config, "pad_token_id", None) or 0
        info = dataclasses.replace(info, pad_id=pad)
        return with_lora(model, options.adapter, options.model, files, info, new)
    if options.head_width is None:
        return model
    head = HeadedConfig(
        encoder=config.to_dict(),
        head_width=options.head_width,
        head_dropout=options.head_dropout,
        **classes,
    )
    model = HeadedForSequenceClassification(head, model)
    begin_at(model, mean)
    return model


def _freeze(model: Any, options: FinetuneOptions) -> None:
    """Leave only the encoder's last tensors or layers, and the head, to be trained."""
    tensors = list(model.base_model.parameters())
    if options.freeze is not None:
        for tensor in _first(model.base_model, tensors, options.freeze):
            tensor.requires_grad_(False)
    last = options.train_last
    if last is None:
        return
    if last > len(tensors):
        raise UsageError(f"train_last is {last}, but the encoder has {len(tensors)} tensors.")
    for tensor in tensors[: len(tensors) - last]:
        tensor.requires_grad_(False)


def _first(encoder: Any, tensors: Sequence[Any], count: int) -> list[Any]:
    """The tensors before those of layer `count`: embeddings and the layers below.

    Raises:
        UsageError: the encoder has fewer layers, or no list of them.
    """
    number = getattr(encoder.config, "num_hidden_layers", None)
    lists = (m for m in encoder.modules() if isinstance(m, torch.nn.ModuleList))
    layers = next((m for m in lists if len(m) == number), None)
    if layers is None:
        raise UsageError(
            f"freeze: the layers of a {encoder.config.model_type} were not found. Use "
            "--train-last, which counts its tensors."
        )
    if count > len(layers):
        raise UsageError(f"freeze is {count}, but the encoder has {len(layers)} layers.")
    places = {id(tensor): i for i, tensor in enumerate(tensors)}
    begin = [min(places[id(tensor)] for tensor in layer.parameters()) for layer in layers]
    end = 1 + max(places[id(tensor)] for tensor in layers.parameters())
    return list(tensors[: [*begin, end][count]])
