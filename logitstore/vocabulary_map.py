"""One tokenizer's ids as another's: the token of the same bytes, else the one of the same role. NumPy, no MLX.

Computed from the two vocabularies alone, so that a map follows from their fingerprints. What it is for: a teacher's
probability of a token becomes one of the student's token that says the same. Where a token stands in a text is none of
its business: positions are aligned by the texts' bytes, never by this map.

- **Bytes.** Tokens that are text are mapped to tokens that are text, also where special ones have the same bytes.
- **Twice the same bytes**: SentencePiece has a fallback `<0x41>` beside its piece `A`, and emits it only where there is
  no piece. So those of each side are put in order, fallbacks last, else by id, and the n-th is mapped to the n-th;
  where the student has fewer, the rest to its first. A vocabulary is so mapped to itself id by id.
- **Role.** Special tokens are mapped to special tokens of the same content, else of the same role: BOS, EOS, and
  padding and unknown tokens under the names that these have everywhere.
- **Links.** A token of text that the student does not have is spelled in the student's own tokens, longest first from
  the left. That is one way to spell it, not always the tokenizer's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from logitstore.vocabulary import Vocabulary

Ids = npt.NDArray[np.int32]
NONE = -1
MOST_SPELLED = 256
"""Bytes of a token that is spelled in others; longer ones, long runs of one character as a rule, have no link."""
_PADDING = frozenset({b"<pad>", b"[PAD]", b"<|pad|>", b"<PAD>", b"<|padding|>"})
_UNKNOWN = frozenset({b"<unk>", b"[UNK]", b"<|unk|>", b"<UNK>"})
_BYTES = tuple(bytes([byte]) for byte in range(256))


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Which of the student's tokens stands for each of the teacher's."""

    student_ids: Ids
    """[V_teacher]; the student's token of the same bytes, else of the same role; -1 where there is none."""
    student_size: int
    teacher_fingerprint: str
    student_fingerprint: str
    link_lengths: Ids
    """[V_teacher]; how many of the student's tokens spell a token without an equal; 0 where it has one, or none do."""
    link_ids: Ids
    """[n]; those tokens, one teacher's token after another."""

    def __len__(self) -> int:
        return len(self.student_ids)

    def of(self, token_ids: npt.NDArray[np.integer]) -> Ids:
        """The student's tokens, of any shape; -1 also for ids that pad the teacher's LM head."""
        inside = token_ids < len(self)
        found: Ids = np.where(inside, self.student_ids[np.where(inside, token_ids, 0)], NONE).astype(np.int32)
        return found

    @property
    def first_pieces(self) -> Ids:
        """[V_teacher]; the first token of each link, -1 where there is none."""
        there = self.link_lengths > 0
        first = np.full(len(self), NONE, np.int32)
        first[there] = self.link_ids[(np.cumsum(self.link_lengths) - self.link_lengths)[there]]
        return first

    def link(self, token_id: int) -> list[int]:
        """The student's tokens that spell a teacher's token without an equal; empty where there are none."""
        end = int(self.link_lengths[: token_id + 1].sum(dtype=np.int64))
        spelled: list[int] = self.link_ids[end - int(self.link_lengths[token_id]) : end].tolist()
        return spelled


def map_vocabularies(teacher: Vocabulary, student: Vocabulary) -> VocabularyMap:
    """Map every token of the teacher's, as the module says. Ids without a token (``b""``) take no part."""
    student_ids = np.full(len(teacher), NONE, np.int32)
    texts, student_texts = _by_bytes(teacher), _by_bytes(student)
    for token, ids in texts.items():
        if token in student_texts:
            _pair(student_ids, ids, student_texts[token])
    specials, student_specials = _special(teacher), _special(student)
    for token, ids in specials.items():
        if token in student_specials:
            _pair(student_ids, ids, student_specials[token])
    for ids, others in zip(_roles(teacher, specials), _roles(student, student_specials), strict=True):
        if others:
            _pair(student_ids, [i for i in ids if student_ids[i] == NONE], others)

    links: list[list[int]] = [[] for _ in range(len(teacher))]
    firsts = {token: ids[0] for token, ids in student_texts.items()}
    longest = max(map(len, firsts), default=0)
    for token, ids in texts.items():
        if token not in student_texts and len(token) <= MOST_SPELLED:
            spelled = _spelled(token, firsts, longest)
            for i in ids:
                links[i] = spelled
    return VocabularyMap(
        student_ids=student_ids,
        student_size=len(student),
        teacher_fingerprint=teacher.fingerprint(),
        student_fingerprint=student.fingerprint(),
        link_lengths=np.array([len(link) for link in links], np.int32),
        link_ids=np.fromiter(chain.from_iterable(links), np.int32),
    )


def _pair(student_ids: Ids, ids: Sequence[int], others: Sequence[int]) -> None:
    for n, i in enumerate(ids):
        student_ids[i] = others[n if n < len(others) else 0]


def _by_bytes(vocabulary: Vocabulary) -> dict[bytes, list[int]]:
    """The ids of each token of text, those that a tokenizer would rather emit first."""
    fallback = _fallback_ids(vocabulary.tokens)
    found: dict[bytes, list[int]] = {}
    late: list[tuple[bytes, int]] = []
    for i, token in enumerate(vocabulary.tokens):
        if not token or i in vocabulary.special_ids:
            continue
        if i in fallback:
            late.append((token, i))
        else:
            found.setdefault(token, []).append(i)
    for token, i in late:
        found.setdefault(token, []).append(i)
    return found


def _fallback_ids(tokens: tuple[bytes, ...]) -> range:
    """Where SentencePiece has its pieces for single bytes: `<0x00>` to `<0xFF>`, one after another."""
    for start, token in enumerate(tokens):
        if token == b"\0" and tokens[start + 1 : start + 2] == (b"\1",) and tokens[start : start + 256] == _BYTES:
            return range(start, start + 256)
    return range(0)


def _special(vocabulary: Vocabulary) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    for i in sorted(vocabulary.special_ids):
        if i < len(vocabulary) and vocabulary.tokens[i]:
            found.setdefault(vocabulary.tokens[i], []).append(i)
    return found


def _roles(vocabulary: Vocabulary, specials: Mapping[bytes, list[int]]) -> list[list[int]]:
    """The ids that have each role: BOS, EOS, padding, unknown."""
    known = {i for ids in specials.values() for i in ids}
    ends = [[i for i in (end,) if i in known] for end in (vocabulary.bos_id, vocabulary.eos_id)]
    return ends + [_named(specials, names) for names in (_PADDING, _UNKNOWN)]


def _named(specials: Mapping[bytes, list[int]], names: Iterable[bytes]) -> list[int]:
    return sorted(i for name in names for i in specials.get(name, []))


def _spelled(token: bytes, ids: Mapping[bytes, int], longest: int) -> list[int]:
    """Ids of the tokens that spell another, longest first from the left; empty where that ends nowhere."""
    found, at = [], 0
    while at < len(token):
        for end in range(min(len(token), at + longest), at, -1):
            i = ids.get(token[at:end])
            if i is not None:
                found.append(i)
                at = end
                break
        else:
            return []
    return found
