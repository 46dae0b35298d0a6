"""Names that options of a run may have."""

from typing import Literal

OnMiss = Literal["online", "hard-only", "skip", "error"]
FineTuneType = Literal["lora", "dora", "full"]
HiddenKind = Literal["mse", "cosine", "l1"]
CrossVocab = Literal["auto", "mapped", "span", "uld", "gold"]
AttentionKind = Literal["mse", "kl"]
