"""What a store says of itself, for `logitstore info`: read from its manifest and entries, no values touched."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logitstore.codec import LEAST
from logitstore.contract import Store
from logitstore.fidelity import Fidelity
from logitstore.hidden_states import layer_width
from logitstore.journal import journals


def info(store: Store) -> dict[str, Any]:
    """The store's manifest and sizes as JSON values."""
    planes, positions = store.plane_bytes(), store.positions
    disk_bytes = sum(planes.values())
    return store.manifest.to_json() | {
        "fingerprint": store.manifest.fingerprint,
        "digest": store.digest(),
        "shards": store.shard_count,
        "documents": len(store),
        "positions": positions,
        "disk_bytes": disk_bytes,
        "vocabulary_bytes": planes.get("vocabulary", 0),
        "bytes_per_token": disk_bytes / positions if positions else None,
        "unfinished_builds": len(journals(store.path)) if isinstance(store.path, Path) and store.path.is_dir() else 0,
        "fidelity": store.fidelity,
    }


def to_text(facts: dict[str, Any], path: object) -> str:
    """The same for people, a fact a line."""
    teacher, tokenizer, recipe = facts["teacher"], facts["tokenizer"], facts["recipe"]
    serves = facts["serves"]
    losses = f"{', '.join(serves['losses'])} at temperature {_listed(serves['temperatures'])}"
    per_token = f"{facts['bytes_per_token']:.1f}" if facts["bytes_per_token"] else "-"
    shards = f"{facts['shards']:,} shard{'s' * (facts['shards'] != 1)}"
    lines = {
        "store": f"{path} (format {facts['format_version']}, fingerprint {facts['fingerprint']})",
        "teacher": f"{teacher['name']} ({teacher['quantization'] or 'not quantised'}; ran in {teacher['dtype']})",
        "weights": teacher["weights_digest"],
        "adapter": teacher["adapter_digest"] or "none",
        "tokenizer": f"{tokenizer['fingerprint']} ({tokenizer['size']:,} tokens)",
        "LM head": f"{recipe['vocab_size']:,} wide",
        "selection": _selection(recipe),
        "serves": f"{losses}; {serves['estimate']}",
        "digest": "-".join(textwrap.wrap(facts["digest"], 4)),
        "holds": f"{facts['documents']:,} documents, {facts['positions']:,} positions in {shards}",
        "on disk": f"{facts['disk_bytes']:,} bytes, {per_token} per token, all included",
        "vocabulary": f"{facts['vocabulary_bytes']:,} bytes of that, once however many tokens there are",
    }
    if facts.get("prompt_template") is not None:
        lines["prompt"] = json.dumps(facts["prompt_template"])
    if layers := recipe.get("hidden_layers"):
        lines["hidden"] = (
            f"states after layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}, {recipe['hidden_size']:,} "
            f"wide, {len(layers) * layer_width(recipe['hidden_size']):,} bytes a token before compression"
        )
    if facts.get("imported"):
        lines["imported"] = f"from {facts['imported']}; unknown: {', '.join(facts['unknown']) or 'nothing'}"
    if facts["fidelity"]:
        lines["fidelity"] = _fidelity(facts["fidelity"])
    if facts["unfinished_builds"]:
        lines["unfinished"] = (
            f"{facts['unfinished_builds']} build(s) running or interrupted; type the same build command to go on"
        )
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


def _fidelity(facts: dict[str, Any]) -> str:
    try:
        found = Fidelity.from_json(facts)
        positions, degrees = found.angles[-1]
        return (
            f"head L1 {found.head_l1:.4f}, kept mass {found.kept_mass:.3f}, gradient {degrees:.1f} degrees off "
            f"over {positions:,} positions, live against stored"
        )
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return "says what no logitstore writes"


def _selection(recipe: dict[str, Any]) -> str:
    text = f"{recipe['selection']} at temperature {_listed(recipe['temperatures'])}, seed {recipe['seed']}"
    if recipe["replicas"] > 1:
        text += f", {recipe['replicas']} draws"
    if recipe["tail_log_probs"]:
        text += f", with the tail's own log-probs down to log({LEAST:.1e})"
    if recipe["log_z"]:
        text += f", with log Z at {_listed(recipe['log_z'])}"
    return text


def _listed(temperatures: Sequence[float]) -> str:
    return ", ".join(f"{t:g}" for t in temperatures)
