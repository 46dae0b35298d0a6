"""The dataset card of a store on the Hugging Face Hub: what `logitstore info` says of it, and what to type."""

from logitstore.contract import Store
from logitstore.info import info, to_text

WRITTEN = "<!-- `logitstore push` writes this card again; without this line it leaves it alone. -->"
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")


def card(store: Store, url: str) -> str:
    """The text of `README.md`.

    Args:
        url: hf://datasets/OWNER/NAME, of which its reader will type.

    Raises:
        CorruptStoreError: the store is damaged.
    """
    facts = info(store)
    size = _SIZES[min(max(len(str(facts["documents"])) - 3, 0), len(_SIZES) - 1)]
    name = " ".join(str(facts["teacher"]["name"]).split()).replace("`", "'")
    said = to_text(facts, url).replace("```", "'''")
    return f"""---
tags:
- logitstore
- knowledge-distillation
size_categories:
- {size}
---
{WRITTEN}

# What {name} says of {facts["documents"]:,} documents

Next-token distributions of a teacher, at {facts["positions"]:,} positions, to distil students from. Documents are found
by their token ids, which the store holds: whoever has the tokenizer can read them.

```
pip install logitstore
logitstore pull {url} store.zarr
distill-train --store store.zarr --student S --data D
```

```
{said}
```
"""
