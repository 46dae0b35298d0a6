"""What made a store: teacher, tokenizer, recipe. Kept in the store's root, checked before a value is used."""

from dataclasses import asdict, dataclass
from typing import Any

from logitstore.errors import IncompatibleStoreError, StoreFormatError
from logitstore.recipe import Recipe
from logitstore.sealed import file_digest
from logitstore.selection import Selection

FORMAT = "logitstore"
FORMAT_VERSION = 1
ADAPTER = "--adapter-path (in distill-train --teacher-adapter-path)"


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

    @property
    def fingerprint(self) -> str:
        """Hash of what made the store: 32 hex digits. Names do not count, nor the type a teacher computed in."""
        identity = [f"{label}={value}" for label, value, _ in self._identity()]
        return file_digest("\n".join(identity).encode())

    def _identity(self) -> list[tuple[str, object, str]]:
        """(what, value, the flag that names it), in the order in which differences are reported."""
        recipe = self.recipe
        return [
            ("teacher weights", self.teacher.weights_digest, "--teacher"),
            ("teacher config", self.teacher.config_digest, "--teacher"),
            ("adapter", self.teacher.adapter_digest, ADAPTER),
            ("tokenizer", self.tokenizer.fingerprint, "--teacher"),
            ("LM head width", recipe.vocab_size, "--teacher"),
            ("selection", recipe.selection, f"--select {recipe.selection}"),
            ("temperature", float(recipe.temperature), f"--temperature {recipe.temperature}"),
            ("seed", recipe.seed, f"--seed {recipe.seed}"),
        ]

    def require_compatible(self, wanted: "Manifest", where: object) -> None:
        """Check that this store may serve, or be extended by, a run that wants `wanted`.

        Raises:
            IncompatibleStoreError: naming the first difference: found, expected, what to type.
        """
        for (what, found, flag), (_, expected, _) in zip(self._identity(), wanted._identity(), strict=True):
            if found != expected:
                type_this = {
                    "--teacher": "type --teacher with the model that built it",
                    ADAPTER: f"type {ADAPTER} with what built it" if found else f"leave {ADAPTER} out",
                }.get(flag, f"type {flag}")
                built, asked = ("none" if value is None else value for value in (found, expected))
                raise IncompatibleStoreError(
                    f"{where} was built with {what} {built} (teacher {self.teacher.name}), this run has {asked} "
                    f"(teacher {wanted.teacher.name}); {type_this}, or name another store"
                )

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        recipe = asdict(self.recipe) | {"selection": str(self.recipe.selection)}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "teacher": asdict(self.teacher),
            "tokenizer": asdict(self.tokenizer),
            "recipe": recipe,
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
                f"{where} has format {data['format_version']}, this logitstore reads format {FORMAT_VERSION}; "
                "type `pip install --upgrade logitstore`"
            )
        recipe = data["recipe"] | {"selection": Selection.parse(data["recipe"]["selection"])}
        return cls(TeacherIdentity(**data["teacher"]), TokenizerIdentity(**data["tokenizer"]), Recipe(**recipe))
