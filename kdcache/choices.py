"""The words that an option lets one choose from, and limits that code and command line share.

Beside `kdcache.tasks` the only place where they are written. It imports nothing, so that the help
of a command needs none of the libraries that do its work.
"""

from __future__ import annotations

from typing import Final, Literal

Attend = Literal["row", "document"]
Documents = Literal["file", "paragraph", "line"]
Form = Literal["auto", "text", "messages", "prompt", "ids"]
Labels = Literal["token", "next", "none"]
LabelTokens = Literal["first", "all"]
MaskUnit = Literal["token", "word"]
OnError = Literal["fail", "skip"]
Reasoning = Literal["learn", "read"]
Packing = Literal["concat", "none", "split", "whole"]
MAX_RECORD_BYTES: Final = 64 << 20

Attention = Literal["auto", "sdpa", "flash_attention_2", "eager"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["transformers", "vllm"]
Ensemble = Literal["mean-probs", "mean-logits"]

ClassWeights = Literal["equal", "balanced"]
CrossMethod = Literal["likelihood", "hybrid"]
Divergence = Literal["forward-kl", "reverse-kl", "jsd", "mse", "huber"]
Precision = Literal["auto", "bf16", "fp16", "float32"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]
Tail = Literal["bucket", "renormalize"]
