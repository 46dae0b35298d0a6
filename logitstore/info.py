"""What a store says of itself, for `logitstore info`: read from its manifest and entries, no values touched."""

from typing import Any

from logitstore.journal import journals
from logitstore.zarr_store import ZarrStore


def info(store: ZarrStore) -> dict[str, Any]:
    """The store's manifest and sizes as JSON values."""
    disk_bytes, positions = store.disk_bytes, store.positions
    return store.manifest.to_json() | {
        "fingerprint": store.manifest.fingerprint,
        "shards": len(store.shards),
        "documents": len(store),
        "positions": positions,
        "disk_bytes": disk_bytes,
        "vocabulary_bytes": sum(
            file["bytes"] for name, file in store.root.files.items() if name.startswith("vocabulary")
        ),
        "bytes_per_token": disk_bytes / positions if positions else None,
        "unfinished_builds": len(journals(store.path)),
    }


def to_text(facts: dict[str, Any], path: object) -> str:
    """The same for people, a fact a line."""
    teacher, tokenizer, recipe = facts["teacher"], facts["tokenizer"], facts["recipe"]
    per_token = f"{facts['bytes_per_token']:.1f}" if facts["bytes_per_token"] else "-"
    lines = {
        "store": f"{path} (format {facts['format_version']}, fingerprint {facts['fingerprint']})",
        "teacher": f"{teacher['name']} ({teacher['quantization'] or 'not quantised'}; ran in {teacher['dtype']})",
        "weights": teacher["weights_digest"],
        "adapter": teacher["adapter_digest"] or "none",
        "tokenizer": f"{tokenizer['fingerprint']} ({tokenizer['size']:,} tokens)",
        "LM head": f"{recipe['vocab_size']:,} wide",
        "selection": f"{recipe['selection']} at temperature {recipe['temperature']:g}, seed {recipe['seed']}",
        "holds": f"{facts['documents']:,} documents, {facts['positions']:,} positions in {facts['shards']:,} shards",
        "on disk": f"{facts['disk_bytes']:,} bytes, {per_token} per token, all included",
        "vocabulary": f"{facts['vocabulary_bytes']:,} bytes of that, once however many tokens there are",
    }
    if facts["unfinished_builds"]:
        lines["unfinished"] = (
            f"{facts['unfinished_builds']} build(s) running or interrupted; type the same build command to go on"
        )
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())
