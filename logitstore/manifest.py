"""What made a store: teacher, tokenizer, recipe. Kept in the store's root, checked before a value is used."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from types import UnionType
from typing import Any

from logitstore.errors import IncompatibleStoreError, StoreFormatError
from logitstore.recipe import Recipe
from logitstore.sealed import file_digest
from logitstore.selection import Selection
from logitstore.vocabulary import Vocabulary

FORMAT = "logitstore"
FORMAT_VERSION = 1
MOST_TOKENS = 1 << 24
_LATER = ("prompt template", "hidden layers", "hidden size")
"""Not part of a fingerprint where a store has none: those that were built before are what they were."""
ADAPTER = "--adapter-path (in distill-train --teacher-adapter-path)"
TEMPLATE = "--prompt-template (in distill-train --teacher-prompt-template)"


@dataclass(frozen=True)
class TeacherIdentity:
    """Which weights the targets come from. Digests are of content; the name is for people."""

    name: str
    weights_digest: str
    config_digest: str | None
    """None where the weights digest covers it, as that of a .gguf file."""
    adapter_digest: str | None
    quantization: str | None
    dtype: str
    """The type the teacher computed in when the store was begun; another gives the same targets up to its rounding."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer the token ids belong to."""

    fingerprint: str
    size: int
    """Number of tokens; the LM head may be wider (`Recipe.vocab_size`)."""
    chat_template_digest: str | None


@dataclass(frozen=True)
class Manifest:
    """Everything that must be equal for two builds to write into one store, or for a run to read it."""

    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    recipe: Recipe
    imported: str | None = None
    """The format of the cache that it was imported from; None where a teacher was asked."""
    unknown: tuple[str, ...] = ()
    """What that cache did not record; its values are the lowest or highest code, or were assumed. The weights digest
    covers it."""
    prompt_template: str | None = None
    """What stood around the documents' prompts when they were tokenised."""

    @property
    def fingerprint(self) -> str:
        """Hash of what made the store: 32 hex digits. Names do not count, nor the type a teacher computed in."""
        identity = [
            f"{label}={value}" for label, value, _ in self._identity() if value is not None or label not in _LATER
        ]
        return file_digest("\n".join(identity).encode())

    def _identity(self) -> list[tuple[str, object, str]]:
        """(what, value, the flag that names it), in the order in which differences are reported."""
        recipe = self.recipe
        layers = ",".join(map(str, recipe.hidden_layers))
        return [
            ("teacher weights", self.teacher.weights_digest, "--teacher"),
            ("teacher config", self.teacher.config_digest, "--teacher"),
            ("adapter", self.teacher.adapter_digest, ADAPTER),
            ("tokenizer", self.tokenizer.fingerprint, "--teacher"),
            ("LM head width", recipe.vocab_size, "--teacher"),
            ("selection", recipe.selection, f"--select {recipe.selection}"),
            ("temperature", _listed(recipe.temperatures), f"--temperature {_listed(recipe.temperatures)}"),
            ("replicas", recipe.replicas, f"--replicas {recipe.replicas}"),
            ("tail log-probs", recipe.tail_log_probs or None, "--tail-log-probs"),
            ("log Z", _listed(recipe.log_z) or None, f"--log-z {_listed(recipe.log_z)}".strip()),
            ("seed", recipe.seed, f"--seed {recipe.seed}"),
            ("prompt template", None if self.prompt_template is None else json.dumps(self.prompt_template), TEMPLATE),
            ("hidden layers", layers or None, f"--hidden-layers {layers}".strip()),
            ("hidden size", recipe.hidden_size or None, "--teacher"),
        ]

    def require_compatible(self, wanted: "Manifest", where: object) -> None:
        """Check that this store may serve, or be extended by, a run that wants `wanted`.

        Raises:
            IncompatibleStoreError: naming the first difference: found, expected, what to type.
        """
        for what, found, expected, flag in self._differences(wanted):
            ending = {
                "--teacher": " with the model that built it",
                ADAPTER: " with what built it",
                TEMPLATE: " with it",
            }.get(flag, "")
            left_out = found is None and flag != "--teacher"
            type_this = f"leave {flag} out" if left_out else f"type {flag}{ending}"
            built, asked = ("none" if value is None else value for value in (found, expected))
            raise IncompatibleStoreError(
                f"{where} was built with {what} {built} (teacher {self.teacher.name}), this run has {asked} "
                f"(teacher {wanted.teacher.name}); {type_this}, or name another store"
            )

    def require_teacher(self, wanted: "Manifest", where: object) -> None:
        """The same for one that brings no documents, and so no prompt template, of its own."""
        self.require_compatible(replace(wanted, prompt_template=self.prompt_template), where)

    def first_difference(self, other: "Manifest") -> tuple[str, object, object] | None:
        """What tells two apart first, and its values here and there; None where their fingerprints are equal."""
        return next(((what, found, expected) for what, found, expected, _ in self._differences(other)), None)

    def _differences(self, other: "Manifest") -> Iterator[tuple[str, object, object, str]]:
        for (what, found, flag), (_, expected, _) in zip(self._identity(), other._identity(), strict=True):
            if found != expected:
                yield what, found, expected, flag

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        recipe = asdict(self.recipe) | {"selection": str(self.recipe.selection)}
        if not self.recipe.hidden_layers:  # stores without them are what they were before there were any
            del recipe["hidden_layers"], recipe["hidden_size"]
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "teacher": asdict(self.teacher),
            "tokenizer": asdict(self.tokenizer),
            "recipe": recipe,
            "serves": self.recipe.serves,
            **({"imported": self.imported, "unknown": list(self.unknown)} if self.imported else {}),
            **({} if self.prompt_template is None else {"prompt_template": self.prompt_template}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], where: object) -> "Manifest":
        """Read a manifest.

        Raises:
            StoreFormatError: not a logitstore manifest, or one of a newer format.
        """
        if data.get("format") != FORMAT:
            raise StoreFormatError(
                f"{where} is a Zarr group, but not a logitstore; type the path that `logitstore build --out` was given"
            )
        if data["format_version"] != FORMAT_VERSION:
            raise StoreFormatError(
                f"{where} has format {data['format_version']!r}, this logitstore reads format {FORMAT_VERSION}; "
                "type `pip install --upgrade logitstore`"
            )
        recipe = dict(data["recipe"])
        if unknown_keys := sorted(recipe.keys() - {field.name for field in fields(Recipe)}):
            raise StoreFormatError(
                f"{where} keeps {unknown_keys[0]!r}, which this logitstore cannot read; "
                "type `pip install --upgrade logitstore`"
            )
        for kind, values in (
            (TeacherIdentity, data["teacher"]),
            (TokenizerIdentity, data["tokenizer"]),
            (Recipe, recipe),
        ):
            _require_types(kind, values)
        if not (0 <= recipe["seed"] < 1 << 64 and 0 <= data["tokenizer"]["size"] <= MOST_TOKENS):
            raise ValueError("its seed, or the size of its tokenizer")
        recipe["selection"] = Selection.parse(recipe["selection"])
        for name in ("temperatures", "log_z"):
            recipe[name] = tuple(map(float, recipe[name]))
        layers = recipe.get("hidden_layers", [])
        if not (isinstance(layers, list | tuple) and all(type(layer) is int for layer in layers)):
            raise TypeError("its hidden layers")
        recipe["hidden_layers"] = tuple(layers)
        imported, unknown = data.get("imported"), data.get("unknown", [])
        if not (
            isinstance(imported, str | None) and isinstance(unknown, list) and all(isinstance(u, str) for u in unknown)
        ):
            raise TypeError("what is said of its import")
        teacher, tokenizer = TeacherIdentity(**data["teacher"]), TokenizerIdentity(**data["tokenizer"])
        template = data.get("prompt_template")
        if not isinstance(template, str | None):
            raise TypeError("its prompt template")
        return cls(teacher, tokenizer, Recipe(**recipe), imported, tuple(unknown), template)


def tokenizer_identity(tokenizer: object, vocabulary: Vocabulary) -> TokenizerIdentity:
    """What a manifest says of a tokenizer."""
    return TokenizerIdentity(vocabulary.fingerprint(), len(vocabulary), template_digest(tokenizer))


def template_digest(tokenizer: object) -> str | None:
    """Of a tokenizer's chat template; None where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return blake2b(str(template).encode(), digest_size=16).hexdigest() if template else None


def _require_types(kind: Any, values: dict[str, Any]) -> None:
    """Raise TypeError where a value is not of the type that a dataclass says; lists are for the caller."""
    for field in fields(kind):
        if isinstance(field.type, type | UnionType) and field.type is not Selection and field.name in values:
            value = values[field.name]
            if not isinstance(value, field.type) or (isinstance(value, bool) and field.type is not bool):
                raise TypeError(f"{field.name} is {type(value).__name__}")


def _listed(temperatures: tuple[float, ...]) -> str:
    return ",".join(f"{float(t)}" for t in temperatures)
