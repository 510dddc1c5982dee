"""Every layout of `kdcache import`, by files made after its documented format: one contract.

A new layout is an entry of `EXAMPLES`: what writes its files, and the options that read them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_interchange import IDS, LOGPROBS, TOKENIZER, TOP, decoded, nested, take_in
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdcache.cache import Cache
from kdcache.commands.import_.apart import steps_of
from kdcache.commands.import_.layouts import LAYOUTS
from kdcache.errors import UsageError
from kdcache.tasks import IGNORE

pytestmark = pytest.mark.slow

SHARES = [[76, 38, 13], [100, 27, 0], [64, 62, 1]]  # of 127
DRAWN_AT = 2.0
INT, FLOAT = pa.list_(pa.int64()), pa.float64()


def table(folder: Path, columns: dict[str, Any], name: str = "data_0") -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def rows(folder: Path, **others: Any) -> Path:
    return table(folder, {"input_ids": pa.array([IDS], INT), **others})


def plain(folder: Path) -> dict[str, Any]:
    targets = {
        "target_ids": nested([TOP], pa.int32()),
        "target_logprobs": nested([LOGPROBS], FLOAT),
    }
    return {"corpus": (str(rows(folder, **targets)),), "targets": "next"}


def ours(folder: Path) -> dict[str, Any]:
    """What `export` writes: a target stands beside the token before, and a label's logarithm."""
    probs = [[math.exp(x) for x in one] for one in LOGPROBS]
    columns = {
        "target_ids": nested([[*TOP, []]], pa.int32()),
        "target_probs": nested([[*probs, []]], FLOAT),
        "teacher_logprob": pa.array([[-2.0, -3.0, -1.0, None]], pa.list_(pa.float32())),
    }
    return {"corpus": (str(rows(folder, **columns)),)}


def axolotl(folder: Path, mask: list[list[int]] | None = None) -> dict[str, Any]:
    """Of its prepared datasets: a distribution stands beside the token that it is of."""
    columns = {
        "attention_mask": pa.array([[1] * 4], pa.list_(pa.int8())),
        "labels": pa.array([[-100, *IDS[1:]]], pa.list_(pa.int32())),
        "position_ids": pa.array([[0, 1, 2, 3]], INT),
        "target_token_ids": nested([[[0, 1, 2], *TOP]], pa.int64()),
        "target_logprobs": nested([[[-math.inf] * 3, *LOGPROBS]], FLOAT),
        "target_mask": nested([mask or [[0] * 3, [1] * 3, [1] * 3, [1] * 3]], pa.int64()),
    }
    return {"corpus": (str(rows(folder, **columns)),)}


def compressed(folder: Path) -> dict[str, Any]:
    """Bytes by hand: two numbers in bfloat16, the third of a line and a difference."""
    size = len(AutoTokenizer.from_pretrained(TOKENIZER))
    bits = math.ceil(math.log2(size))
    logprobs, ids = [], []
    for best, values in zip(TOP, LOGPROBS, strict=True):
        exact = b"".join(struct.pack("<f", value)[2:] for value in values[:2])
        # the polynomial says 0.5 more; the bin takes it off again: -64 of 128 steps of 1.
        bin_ = struct.pack("<f", 1 / 128) + bytes([-64 + 128])
        logprobs.append(list(exact + struct.pack("<f", values[2] + 0.5) + bin_))
        text = "".join(f"{i:0{bits}b}" for i in best)
        text += "0" * (-len(text) % 8)
        ids.append([int(text[at : at + 8], 2) for at in range(0, len(text), 8)])
    columns = {
        "compressed_logprobs": nested([logprobs], pa.uint8()),
        "bytepacked_indices": nested([ids], pa.uint8()),
        "messages": pa.array(["[]"]),
    }
    rows(folder, **columns)
    options = {"corpus": (str(folder),)}
    if not (folder / "compression_config.yaml").exists():
        with pytest.raises(UsageError, match="no compression_config.yaml beside it"):
            take_in(folder, folder.parent / "none", layout="open-instruct", **options)
    (folder / "compression_config.yaml").write_text(
        f"d: {size}\nk: 3\nexact_k: 2\nexact_dtype: bfloat16\npolynomial_terms: [0]\n"
        "term_dtype: float32\ndelta_encoding: false\nerror_diffusion: false\n"
        "residual_bins:\n- {scale_dtype: float32, element_bits: 8, num_elements: 1}\n"
    )
    return options


def distillkit(folder: Path) -> dict[str, Any]:
    columns = {
        "token_ids": nested([TOP], pa.int64()),
        "top_values": nested([LOGPROBS], pa.float32()),
    }
    return {"corpus": (str(rows(folder, **columns)),)}


def llamakd(folder: Path, pads: int = 0) -> dict[str, Any]:
    """`inputs: [1024]`, `targets: [1024, 2, 32]`: logarithms, then their ids; padded left."""
    eos = AutoTokenizer.from_pretrained(TOKENIZER).eos_token_id
    nothing = [[-0.1, -9.0, -9.5], [0.0, 1.0, 2.0]]
    pairs = [[one, [float(i) for i in ids]] for one, ids in zip(LOGPROBS, TOP, strict=True)]
    columns = {
        "inputs": pa.array([[eos] * pads + IDS], INT),
        "targets": pa.array(
            [[nothing] * pads + [*pairs, nothing]], pa.list_(pa.list_(pa.list_(FLOAT)))
        ),
        "line_number": pa.array([4]),
    }
    return {"corpus": (str(table(folder, columns)),)}


def save(items: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(items, buffer)
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def megatron(folder: Path, ranks: int = 2, hashes: str = "same") -> dict[str, Any]:
    """Two iterations of two micro-batches of one row: row 5 of these has the targets.

    [S, B, K] tensors, ids in 16 bits and one; what a nucleus leaves out is -1000 at id -1.
    """
    logits = folder / "logits"
    logits.mkdir(parents=True)
    micro = 2
    for rank in range(ranks):
        meta = {"hash": hashes if hashes == "same" else str(rank), "saver": {"k": 4, "p": 0.99}}
        members = {"_meta.json": json.dumps(meta).encode()}
        for iteration in range(2):
            kept: dict[str, list[torch.Tensor]] = {"values": [], "indices_low": [], "bit_17": []}
            for m in range(micro):
                index = (iteration * micro + m) * ranks + rank
                ids = (torch.tensor(TOP) + (index != 5)).unsqueeze(1)
                values = torch.tensor(LOGPROBS).unsqueeze(1).half()
                ids = torch.cat([ids, torch.full((3, 1, 1), -1)], -1)
                values = torch.cat([values, torch.full((3, 1, 1), -1e3).half()], -1)
                kept["values"].append(values)
                kept["indices_low"].append((ids & 0xFFFF).to(torch.uint16))
                kept["bit_17"].append((ids >> 16).bool())
            data = pa.Codec("zstd").compress(save(kept), asbytes=True)
            members[f"{iteration}.pt.zst"] = data
        tar(logits / f"cp0_dp{rank}__1.tar", members)
    where = rows(folder / "rows", index=pa.array([5]))
    return {"corpus": (str(where),), "logits": str(logits)}


def pack(ids: list[list[int]], shares: list[list[int]]) -> torch.Tensor:
    """17 bits of an id and 7 of its share, in 3 bytes from the lowest on."""
    words = [
        (i & 0x1FFFF) | (q << 17)
        for some, parts in zip(ids, shares, strict=True)
        for i, q in zip(some, parts, strict=True)
    ]
    return torch.tensor(
        [word >> shift & 255 for word in words for shift in (0, 8, 16)], dtype=torch.uint8
    )


def sekd(
    folder: Path, shares: list[list[int]] = SHARES, rows_of_a_batch: int = 1
) -> dict[str, Any]:
    """Rows by the SHA-1 of their ids; an unused entry has the id after the last, and no share."""
    logits = folder / "logits"
    logits.mkdir(parents=True)
    size = len(AutoTokenizer.from_pretrained(TOKENIZER))
    ids = [
        [size if not q else i for i, q in zip(*one, strict=True)]
        for one in zip(TOP, shares, strict=True)
    ]
    rs = {
        "U": 3,
        "N": 50,
        "id_bits": 17,
        "prob_bits": 7,
        "sentinel_id": size,
        "packed": pack(ids, shares),
    }
    key = hashlib.sha1(struct.pack("<4q", *IDS) * rows_of_a_batch).hexdigest()
    item = {
        "key": key,
        "valid_mask": torch.ones(3, dtype=torch.bool),
        "rs": rs,
        "cache_mode": "none",
    }
    (logits / "shard_000000.pt").write_bytes(save([{"key": "another"}, item]))
    signature = {"kd_temperature": DRAWN_AT, "rs_vocab_samples": 3, "rs_samples": 50}
    manifest = {
        "signature": {**signature, "id_bits": 17, "prob_bits": 7, "teacher_name": "big"},
        "items": {key: {"shard": 0, "index": 1}},
        "shards": [{"path": "shard_000000.pt", "n": 2}],
    }
    (logits / "manifest.json").write_text(json.dumps(manifest))
    return {"corpus": (str(rows(folder / "rows")),), "logits": str(logits)}


EXAMPLES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "kdcache": ours,
    "axolotl": axolotl,
    "distillkit": distillkit,
    "open-instruct": compressed,
    "llamakd": llamakd,
    "megatron": megatron,
    "se-kd3x": sekd,
    "plain": plain,
}


def bring(folder: Path, out: Path, layout: str, **options: Any) -> Cache:
    return take_in(folder, out, layout=layout, **options)


def check(cache: Cache, layout: str) -> None:
    data = cache.read(0)
    (row,) = [data.row(i) for i in range(len(data))]
    assert [*row.input_ids.tolist(), int(row.labels[-1])] == IDS
    (temperature,) = cache.spec.temperatures
    assert temperature == (DRAWN_AT if LAYOUTS[layout].draws else 1.0)
    if LAYOUTS[layout].draws:
        wanted = [
            {i: q / 127 for i, q in zip(*one, strict=True) if q}
            for one in zip(TOP, SHARES, strict=True)
        ]
        assert cache.spec.codec == "sample:127"
        assert not data.targets.at(temperature).exact  # type: ignore[union-attr]
        tails = [0.0] * 3
    else:
        pairs = zip(TOP, LOGPROBS, strict=True)
        wanted = [{i: math.exp(x) for i, x in zip(*one, strict=True)} for one in pairs]
        tails = [1 - sum(one.values()) for one in wanted]
    found = decoded(cache, temperature)
    for got, want in zip(found, wanted, strict=True):
        assert got == pytest.approx(want, abs=2e-3)
    assert data.targets.at(temperature).tail.tolist() == pytest.approx(tails, abs=2e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_targets_of_its_source_at_its_temperature(
    layout: str, tmp_path: Path
) -> None:
    options = EXAMPLES[layout](tmp_path / "files")
    cache = bring(tmp_path, tmp_path / "cache", layout, **options)
    check(cache, layout)
    assert cache.notes["imported"]["given"] == LAYOUTS[layout].given
    for other in (0.5, 3.0):
        with pytest.raises(UsageError, match="temperature"):
            cache.read(0).targets.at(other)
    digest = cache.digest
    assert bring(tmp_path, tmp_path / "cache", layout, **options).digest == digest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_are_cut_or_of_another_layout_are_refused(layout: str, tmp_path: Path) -> None:
    options = EXAMPLES[layout](tmp_path / "files")
    place = Path(options.get("logits", options["corpus"][0]))
    for path in sorted(place.iterdir()):
        if path.suffix in (".tar", ".pt", ".parquet"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    with pytest.raises(UsageError):
        bring(tmp_path, tmp_path / "cut", layout, **options)
    rows(tmp_path / "others", columns_of_no_layout=pa.array([1]))
    (tmp_path / "none").mkdir()
    other = {"corpus": (str(tmp_path / "others"),)}
    other |= {"logits": str(tmp_path / "none")} if "logits" in options else {}
    with pytest.raises(UsageError):
        bring(tmp_path, tmp_path / "other", layout, **{**options, **other})


def test_a_token_that_axolotl_hides_has_no_label(tmp_path: Path) -> None:
    options = axolotl(tmp_path / "files", [[0] * 3, [0] * 3, [1] * 3, [1] * 3])
    cache = bring(tmp_path, tmp_path / "cache", "axolotl", **options)
    assert cache.read(0).labels.tolist() == [IGNORE, 7, 8]


def test_padding_of_llamakd_is_no_context(tmp_path: Path) -> None:
    options = llamakd(tmp_path / "files", pads=3)
    check(bring(tmp_path, tmp_path / "cache", "llamakd", **options), "llamakd")


class TestMegatron:
    def test_another_order_of_rows_is_found_by_its_numbers(self, tmp_path: Path) -> None:
        options = megatron(tmp_path / "files")
        numbers = [7, 0, 5]
        where = table(
            tmp_path / "more", {"input_ids": pa.array([IDS] * 3, INT), "index": pa.array(numbers)}
        )
        options["corpus"] = (str(where),)
        cache = bring(tmp_path, tmp_path / "cache", "megatron", **options)
        best = [max(one, key=one.__getitem__) for one in decoded(cache)[::3]]
        assert best == [TOP[0][0] + (number != 5) for number in numbers]

    def test_what_no_file_holds_is_named(self, tmp_path: Path) -> None:
        options = megatron(tmp_path / "files")
        for name, column in (("later", [8]), ("none", ["x"])):
            where = rows(tmp_path / name, index=pa.array(column))
            with pytest.raises(
                UsageError, match="iteration 2, which no file|is not the number of a"
            ):
                bring(
                    tmp_path, tmp_path / "cache", "megatron", **{**options, "corpus": (str(where),)}
                )

    def test_files_of_two_runs_and_of_cut_rows_are_refused(self, tmp_path: Path) -> None:
        options = megatron(tmp_path / "files", hashes="other")
        with pytest.raises(UsageError, match="files of several runs"):
            bring(tmp_path, tmp_path / "cache", "megatron", **options)
        options = megatron(tmp_path / "again")
        tar(Path(options["logits"]) / "cp1_dp0__1.tar", {})
        with pytest.raises(UsageError, match="context-parallel ranks"):
            bring(tmp_path, tmp_path / "cache", "megatron", **options)


class TestDraws:
    def test_draws_that_were_left_out_are_a_bias_and_refused(self, tmp_path: Path) -> None:
        shares = [[76, 38, 13], [90, 27, 0], [64, 62, 1]]
        options = sekd(tmp_path / "files", shares)
        with pytest.raises(UsageError, match=r"sum to 0\.92.*no unbiased sample .*--excess clip"):
            bring(tmp_path, tmp_path / "cache", "se-kd3x", **options)
        cache = bring(tmp_path, tmp_path / "cache", "se-kd3x", excess="clip", **options)
        assert decoded(cache, DRAWN_AT)[1] == pytest.approx({7: 90 / 117, 1: 27 / 117}, abs=1 / 254)

    def test_a_row_of_a_batch_has_no_key_of_its_own(self, tmp_path: Path) -> None:
        options = sekd(tmp_path / "files", rows_of_a_batch=2)
        with pytest.raises(UsageError, match="the first one alone, under the hash of all"):
            bring(tmp_path, tmp_path / "cache", "se-kd3x", **options)

    def test_units_have_the_proportions_of_the_weights(self) -> None:
        weights = np.random.default_rng(0).dirichlet(np.ones(9), 50)
        steps = steps_of(weights, 254)
        assert (steps.sum(1) == 254).all()
        assert np.abs(steps / 254 - weights).max() < 1 / 254

    @pytest.mark.parametrize("layout", ["megatron", "se-kd3x"])
    def test_ids_of_a_larger_vocabulary_wrap_and_are_refused(
        self, layout: str, tmp_path: Path
    ) -> None:
        vocabulary = {f"t{i}": i for i in range((1 << 17) + 1)}
        large = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
        PreTrainedTokenizerFast(tokenizer_object=large).save_pretrained(tmp_path / "large")
        options = EXAMPLES[layout](tmp_path / "files")
        with pytest.raises(UsageError, match="131,073 ids: those of 131,072 and more stand"):
            bring(
                tmp_path, tmp_path / "cache", layout, tokenizer=str(tmp_path / "large"), **options
            )


class _Runs:
    """What a pickle may have run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("layout", ["megatron", "se-kd3x"])
def test_nothing_in_a_file_of_tensors_runs(layout: str, tmp_path: Path) -> None:
    options = EXAMPLES[layout](tmp_path / "files")
    data = save(_Runs(tmp_path / "ran"))
    for path in Path(options["logits"]).iterdir():
        if path.suffix == ".tar":
            tar(path, {"0.pt.zst": pa.Codec("zstd").compress(data, asbytes=True)})
        elif path.suffix == ".pt":
            path.write_bytes(data)
    with pytest.raises(UsageError, match="is not a file of this layout"):
        bring(tmp_path, tmp_path / "cache", layout, **options)
    assert not (tmp_path / "ran").exists()
