"""A document as the store sees it, for a terminal: each position's text, and the candidates kept for what follows."""

from collections.abc import Iterator

import numpy as np

from logitstore.contract import Store
from logitstore.errors import ConfigError
from logitstore.measures import unknown

SHOWN = 6
NO_TOKEN = "<no token {}>"
"""The LM head may be wider than the tokenizer, and every id may be drawn."""
LINE = "{:>5}  {:<18} {:>7} {:>7}  {}"


def inspect(store: Store, number: int, shown: int = SHOWN) -> Iterator[str]:
    """Lines of text: position, the token that followed, its probability, the entropy, and the kept candidates.

    The label is marked with *, entries drawn from the tail with ~. "-" is what an imported cache does not know.

    Raises:
        ConfigError: there is no such document.
    """
    try:
        token_ids, targets = store.document(number)
    except IndexError:
        there = f"0 .. {len(store) - 1}; type --document 0" if len(store) else "none yet; type `logitstore build`"
        raise ConfigError(f"document {number} is not there: {store.path} holds {there}") from None
    vocabulary, lacking = store.vocabulary, unknown(store.manifest)

    def text(token_id: int) -> str:
        if token_id >= len(vocabulary):
            return NO_TOKEN.format(token_id)
        token = vocabulary.tokens[token_id]
        try:
            return repr(token.decode())
        except UnicodeDecodeError:
            return repr(token)  # bytes that are not whole characters

    title = f"document {number}: {len(token_ids):,} tokens"
    yield title + ("" if "nll" in lacking else f", perplexity {np.exp(-targets.label_log_prob.mean()):.2f}")
    yield LINE.format("pos", "next token", "p", "entropy", "kept candidates (* what followed, ~ drawn from the tail)")
    for t in range(len(targets)):
        label = int(token_ids[t + 1])
        order = np.argsort(-targets.weights[t], kind="stable")
        entries = []
        for slot in order[: min(shown, int((targets.weights[t] > 0).sum()))]:
            token, weight = int(targets.ids[t, slot]), float(targets.weights[t, slot])
            mark = ("*" if token == label else "") + ("~" if slot >= targets.head_count[t] else "")
            entries.append(f"{text(token)}{mark} {weight:.3f}")
        is_kept = bool(((targets.ids[t] == label) & (targets.weights[t] > 0)).any())
        probability = f"{np.exp(targets.label_log_prob[t]):.3f}" if is_kept or "nll" not in lacking else "-"
        entropy = "-" if "entropy" in lacking else f"{targets.entropy[t]:.2f}"
        yield LINE.format(t, text(label)[:18], probability, entropy, "  ".join(entries))
