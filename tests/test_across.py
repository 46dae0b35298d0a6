"""Students of another tokenizer than the teacher's, from its store alone."""

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill_kernels
from distill_kernels import SparseKL

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distill_trainer.across import Naming, gold_asked, mapped_asked, span_asked, uld_asked
from distill_trainer.batch_loss import batch_loss
from distill_trainer.batches import Weighing, collate
from distill_trainer.cross_vocab import crossing_of
from distill_trainer.loss_values import loss_values
from distill_trainer.spans import SpanLoss
from distill_trainer.teachers import in_order
from distill_trainer.texts import Readings, Texts
from distill_trainer.train import train
from logitstore.alignment import Alignment, Spelled, by_text, by_turns, spell, turns
from logitstore.documents import Document, read_documents
from logitstore.errors import ConfigError, DatasetError, IncompatibleStoreError, LogitstoreError
from logitstore.measures import UNKNOWN_LABEL
from logitstore.model import load_model
from logitstore.sequences import TokenSequence, tokenize
from logitstore.store import open_store
from logitstore.targets import SparseTargets
from logitstore.tokenizer import load_tokenizer
from logitstore.vocabulary import vocabulary_of
from logitstore.vocabulary_map import map_vocabularies
from tests.runs import World, make_world, write_jsonl
from tests.tiny import CHAT_TEMPLATE, CORPUS, save_tiny_model, tiny_tokenizer
from tests.tokenizers import wordpiece

SAMPLE, TRUNCATED = "threshold:16", "top-k:50"
SMALL = 330
LEARNING = {"fine_tune_type": "full", "learning_rate": 2e-3, "iters": 10, "alpha": 1.0, "min_coverage": 0.3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Stores by a teacher of 384 tokens, and a student of 330, whose head has 20 columns of padding."""
    world = make_world(tmp_path_factory.mktemp("world"), store=False)
    for select in (SAMPLE, TRUNCATED):
        world.build(path(world, select), select=select)
    save_tiny_model(other(world), seed=5, vocab_size=SMALL + 20)
    its_own().save_pretrained(other(world))
    write_jsonl(world.folder / "train.jsonl", [{"text": text} for text in CORPUS[:4]])
    write_jsonl(world.folder / "valid.jsonl", [{"text": text} for text in CORPUS[4:]])
    return world


def its_own() -> PreTrainedTokenizerFast:
    """The student's tokenizer, which has merges that the teacher's has not."""
    return tiny_tokenizer(SMALL, texts=[text[::2] + text for text in CORPUS[2:]])


def path(world: World, select: str) -> Path:
    return world.folder / f"{select.replace(':', '-')}.zarr"


def other(world: World) -> Path:
    return world.folder / "other"


def sequences(tokenizer: Any, world: World) -> list[TokenSequence]:
    return list(tokenize(read_documents(str(world.data)), tokenizer, 512))


def log_probs(world: World, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """float64 [L - 1, V], of the live teacher."""
    logits = np.array(load_model(world.teacher).model(mx.array(token_ids[None, :-1]))[0], np.float64)
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=1)[:, None])


def pairs(world: World) -> list[tuple[TokenSequence, TokenSequence]]:
    """Each document as the student and as the teacher reads it."""
    return list(zip(sequences(its_own(), world), sequences(tiny_tokenizer(), world), strict=True))


def naming(*, links: bool = True) -> Naming:
    """Without links a token of the teacher's that the student lacks has no name."""
    teacher, student = vocabulary_of(tiny_tokenizer()), vocabulary_of(its_own())
    found = map_vocabularies(teacher, student)
    if not links:
        found = replace(found, link_lengths=np.zeros_like(found.link_lengths), link_ids=np.empty(0, np.int32))
    return Naming.of(found, teacher, student, SMALL + 20)


def mapped(
    world: World, select: str, one: TokenSequence, its: TokenSequence, names: Naming
) -> tuple[Any, SparseTargets]:
    own = spell(one.token_ids, vocabulary_of(its_own()))
    theirs = spell(its.token_ids, vocabulary_of(tiny_tokenizer()))
    asked = mapped_asked(its.token_ids, by_text(own, theirs), names, unbiased=select == SAMPLE)
    found = open_store(path(world, select)).get(its.token_ids)
    assert found is not None
    return asked, asked.shifted(found)


def first_piece(token: bytes, spelled: dict[bytes, int]) -> int:
    """The longest of the student's tokens that a text begins with."""
    return next(spelled[token[:end]] for end in range(len(token), 0, -1) if token[:end] in spelled)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("select", [SAMPLE, TRUNCATED])
def test_mapped_targets_are_the_teachers_by_the_bytes_of_their_tokens(world: World, select: str, links: bool) -> None:
    """By hand: bytes to ids in a dictionary, entry by entry."""
    teacher, student = tiny_tokenizer(), its_own()
    own = vocabulary_of(student)
    spelled = {token: i for i, token in enumerate(own.tokens)}  # specials have the same names in both
    of_bytes, met = vocabulary_of(teacher).tokens, 0
    names = naming(links=links)
    assert (names.cell is None) == links
    met_without = 0
    for one, its in pairs(world):
        asked, found = mapped(world, select, one, its, names)
        stored = open_store(path(world, select)).get(its.token_ids)
        assert stored is not None and len(found) == len(one.trained)
        text = [vocabulary_of(tokenizer).tokens for tokenizer in (student, teacher)]
        ends = [np.cumsum([len(text[n][i]) for i in s.token_ids.tolist()]).tolist() for n, s in enumerate((one, its))]
        for t in range(len(one.trained)):
            assert asked.taught[t] == (ends[0][t] in ends[1])
            if not asked.taught[t]:
                continue
            met += 1
            row = ends[1].index(ends[0][t])
            expected: dict[int, float] = {}
            lost = 0.0
            for token, weight in zip(stored.ids[row].tolist(), stored.weights[row].tolist(), strict=True):
                name = spelled.get(of_bytes[token])
                if name is None and links and weight:
                    name = first_piece(of_bytes[token], spelled)
                if name is None:
                    lost += weight
                else:
                    expected[name] = expected.get(name, 0) + weight
            tail = np.exp(stored.log_tail_mass[row])
            met_without += lost > 0
            if select == SAMPLE and lost:
                assert names.cell is not None
                expected[names.cell] = lost
            got = {int(i): w for i, w in zip(found.ids[t], found.weights[t], strict=True) if w > 0}
            assert got == pytest.approx({i: w for i, w in expected.items() if w > 0}, rel=1e-5)
            assert np.exp(found.log_tail_mass[t]) == pytest.approx(tail if select == SAMPLE else tail + lost, abs=1e-5)
    assert met > 50
    assert (met_without == 0) == links


def test_a_span_has_the_likelihood_of_the_teachers_tokens_in_it(world: World) -> None:
    store = open_store(path(world, SAMPLE))
    many = 0
    for one, its in pairs(world):
        own, theirs = (
            spell(one.token_ids, vocabulary_of(its_own())),
            spell(its.token_ids, vocabulary_of(tiny_tokenizer())),
        )
        asked, stored = span_asked(its.token_ids, by_text(own, theirs)), store.get(its.token_ids)
        assert stored is not None
        found, p = asked.shifted(stored), log_probs(world, its.token_ids)
        covered = 0
        for last in sorted(set(asked.spans.tolist()) - {-1}):
            first = asked.spans.tolist().index(last)
            begins, ends = own.ends[first], own.ends[last + 1]
            theirs_in = [t for t in range(len(its.trained)) if begins <= theirs.ends[t] < ends]
            of_text = sum(p[t, its.token_ids[t + 1]] for t in theirs_in)
            assert found.label_log_prob[last] == pytest.approx(of_text, abs=len(theirs_in) / 16)
            covered += ends - begins
            many += last > first
        assert covered == len(own.text) - own.ends[np.flatnonzero(asked.taught)[0]]
    assert many > 10


def test_gold_targets_are_the_teachers_at_the_end_of_a_span_and_its_log_prob_up_to_there(world: World) -> None:
    """By hand: bytes to ids in a dictionary, exact names alone, ranks by sorting; every span of every document."""
    own, theirs = vocabulary_of(its_own()), vocabulary_of(tiny_tokenizer())
    spelled = {token: i for i, token in enumerate(own.tokens)}
    names, many, ranked = naming(links=False), 0, 0
    for one, its in pairs(world):
        of_own, of_theirs = spell(one.token_ids, own), spell(its.token_ids, theirs)
        asked = gold_asked(its.token_ids, by_text(of_own, of_theirs), names)
        stored = open_store(path(world, TRUNCATED)).get(its.token_ids)
        assert stored is not None and asked.spans is not None
        found, p = asked.shifted(stored), log_probs(world, its.token_ids)
        for last in sorted(set(asked.spans.tolist()) - {-1}):
            begins, ends = (of_own.ends[at] for at in (asked.spans.tolist().index(last), last + 1))
            rows = [t for t in range(len(its.trained)) if begins <= of_theirs.ends[t] < ends]
            of_text = sum(p[t, its.token_ids[t + 1]] for t in rows[:-1])
            assert found.label_log_prob[last] == pytest.approx(of_text, abs=(len(rows) - 1) / 16)
            many += len(rows) > 1
            entries = sorted(zip(stored.weights[rows[-1]].tolist(), stored.ids[rows[-1]].tolist(), strict=True))[::-1]
            expected, nameless = {}, []
            for weight, token in entries:
                if theirs.tokens[token] in spelled:
                    expected[spelled[theirs.tokens[token]]] = weight
                else:
                    nameless.append(weight)
            got = {int(i): w for i, w in zip(found.ids[last], found.weights[last], strict=True) if w > 0}
            assert [got.pop(SMALL + 20 + rank) for rank in range(len(nameless))] == pytest.approx(nameless, rel=1e-6)
            assert got == pytest.approx(expected, rel=1e-6)
            assert found.log_tail_mass[last] == stored.log_tail_mass[rows[-1]]
            ranked += len(nameless)
    assert many > 3
    assert ranked > 50


@pytest.mark.parametrize("select", [SAMPLE, TRUNCATED])
def test_between_identical_tokenizers_mapped_gives_the_ordinary_batch_bit_for_bit(world: World, select: str) -> None:
    """But for the order of a row's entries."""
    vocabulary = vocabulary_of(tiny_tokenizer())
    same = Naming.of(map_vocabularies(vocabulary, vocabulary), vocabulary, vocabulary, 384)
    assert same.cell is None
    assert same.loss(loss := SparseKL(), unbiased=True) is loss
    store, plain = open_store(path(world, select)), sequences(tiny_tokenizer(), world)
    targets = [store.get(s.token_ids) for s in plain]
    spelled = [spell(s.token_ids, vocabulary) for s in plain]
    across = [
        replace(s, asked=mapped_asked(s.token_ids, by_text(w, w), same, unbiased=select == SAMPLE))
        for s, w in zip(plain, spelled, strict=True)
    ]
    carried = [s.own(t) for s, t in zip(across, targets, strict=True)]
    batches = [collate(plain, targets, Weighing(0.9, "error")), collate(across, carried, Weighing(0.9, "error"))]
    found = []
    for batch in batches:
        assert batch is not None
        by_id = np.argsort(np.where(np.array(batch.weights) > 0, np.array(batch.ids).astype(np.int64), 1 << 40), axis=1)
        ids, weights = (np.take_along_axis(np.array(a), by_id, axis=1) for a in (batch.ids, batch.weights))
        k = 16 if select == SAMPLE else 50
        assert (weights[:, k:] == 0).all()
        columns = (np.array(getattr(batch, name)) for name in ("rows", "labels", "log_tail_mass", "kd_weight"))
        found.append((ids[:, :k] * (weights[:, :k] > 0), weights[:, :k], *columns))
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(("method", "of_rounding"), [("uld", 0.03), ("gold", 5e-4)])
def test_the_teacher_has_next_to_nothing_to_learn_of_itself(world: World, method: str, of_rounding: float) -> None:
    """What there is comes of the store's rounding, to 1/16 nat."""
    vocabulary = vocabulary_of(tiny_tokenizer())
    same = Naming.of(map_vocabularies(vocabulary, vocabulary), vocabulary, vocabulary, 384, links=False)
    across, targets = [], []
    for sequence in sequences(tiny_tokenizer(), world):
        ids, text = sequence.token_ids, spell(sequence.token_ids, vocabulary)
        across.append(
            replace(
                sequence,
                asked=gold_asked(ids, by_text(text, text), same)
                if method == "gold"
                else uld_asked(ids, by_text(text, text)),
            )
        )
        stored = open_store(path(world, TRUNCATED)).get(ids)
        assert stored is not None
        targets.append(across[-1].own(stored))
    batch = collate(across, targets, Weighing(1.0, "error"))
    assert batch is not None
    found = []
    for model in (world.teacher, world.student):
        head = distill_kernels.split_head(load_model(model).model)
        kd = loss_values(head, same.gold_loss(1.0) if method == "gold" else same.sorted_loss(1.0), batch)[0]
        found.append(np.array(kd)[np.array(batch.kd_weight) > 0].mean())
    assert found[0] < of_rounding < found[1] / 4


@pytest.mark.parametrize("method", ["uld", "gold"])
def test_a_chunked_head_gives_the_losses_and_the_gradient_of_whole_logits(world: World, method: str) -> None:
    names, chosen, targets = naming(links=False), [], []
    for one, its in pairs(world)[:3]:
        ids = its.token_ids
        met = by_text(spell(one.token_ids, vocabulary_of(its_own())), spell(ids, vocabulary_of(tiny_tokenizer())))
        chosen.append(replace(one, asked=gold_asked(ids, met, names) if method == "gold" else uld_asked(ids, met)))
        stored = open_store(path(world, TRUNCATED)).get(ids)
        assert stored is not None
        targets.append(chosen[-1].own(stored))
    batch = collate(chosen, targets, Weighing(0.7, "error"))
    assert batch is not None
    model = load_model(other(world)).model
    losses = names.gold_loss(1.0) if method == "gold" else names.sorted_loss(1.0)
    split = distill_kernels.split_head(model)
    assert split.reason is None
    found = []
    for head in (split, distill_kernels.Head(model, reason="tried whole")):
        means, gradients = nn.value_and_grad(model, lambda b, head=head: batch_loss(head, losses, b))(batch)
        found.append([*map(np.array, means), *(np.array(g) for _, g in tree_flatten(gradients))])
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def permuted(tokenizer: PreTrainedTokenizerFast, order: npt.NDArray[np.int64]) -> PreTrainedTokenizerFast:
    """The same tokenizer with other numbers: token i is order[i]."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = description["model"]["vocab"]
    description["model"]["vocab"] = {piece: int(order[i]) for piece, i in vocab.items()}
    for token in description["added_tokens"]:
        token["id"] = int(order[token["id"]])
    description["added_tokens"].sort(key=lambda token: token["id"])
    names = {n: getattr(tokenizer, n) for n in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), **names)


@pytest.mark.parametrize(
    ("select", "method", "loss"),
    [(SAMPLE, "mapped", "kl"), (TRUNCATED, "mapped", "kl"), (TRUNCATED, "gold", "jsd:0.5")],
)
@pytest.mark.parametrize("width", [384, 400], ids=["", "padded"])
def test_a_student_whose_tokens_are_numbered_otherwise_learns_the_same(
    world: World, tmp_path: Path, select: str, method: str, loss: str, width: int
) -> None:
    """Padding of a head makes a difference to a softmax, so both are as wide. `gold` has a loss of its own, which is
    this one where each token has a name and each span is a token.
    """
    order = np.random.default_rng(0).permutation(384)
    tokenizer = permuted(tiny_tokenizer(), order)
    for student in ("plain", "permuted"):
        save_tiny_model(tmp_path / student, seed=2, vocab_size=width)
    weights = mx.load(str(tmp_path / "permuted" / "model.safetensors"))
    name = next(name for name, array in weights.items() if array.shape[0] == width)
    weights[name] = weights[name][mx.array(np.append(np.argsort(order), np.arange(384, width)))]
    mx.save_safetensors(str(tmp_path / "permuted" / "model.safetensors"), weights, metadata={"format": "mlx"})
    tokenizer.save_pretrained(tmp_path / "permuted")
    curves = []
    for student in ("plain", "permuted"):
        _, lines = world.train(
            tmp_path / f"{student}-out",
            student=str(tmp_path / student),
            store=(str(path(world, select)),),
            **LEARNING | {"cross_vocab": "auto" if student == "plain" else method, "min_coverage": 1.0},
            loss=(loss if method == "mapped" or student == "plain" else "kl",),
        )
        curves.append([line["loss"] for line in lines])
        assert ("taught" in lines[0]) == (student == "permuted")
    assert curves[1] == pytest.approx(curves[0], abs=2e-5)


LONGER = {"learning_rate": 3e-3, "iters": 20}
"""What `gold` needs of these texts: most of a likelihood that is a product is small whatever the student says."""


@pytest.mark.parametrize(
    ("select", "method", "less", "options"),
    [
        (SAMPLE, "mapped", 0.003, {}),
        (TRUNCATED, "mapped", 0.003, {}),
        (SAMPLE, "span", 0.003, {}),
        (TRUNCATED, "span", 0.003, {}),
        (TRUNCATED, "uld", 0.003, {}),
        (TRUNCATED, "gold", 0.001, LONGER),
    ],
)
def test_a_student_of_another_tokenizer_learns_from_the_store_what_it_has_not_seen(
    world: World, tmp_path: Path, select: str, method: str, less: float, options: dict[str, Any]
) -> None:
    shown = {"dataset": str(world.folder), "valid_split": "valid", "steps_per_eval": 1}
    store = (str(path(world, select)),)
    report, lines = world.train(
        tmp_path / "o", student=str(other(world)), store=store, cross_vocab=method, **LEARNING | options, **shown
    )
    assert lines[-1]["valid_kd_loss"] < lines[0]["valid_kd_loss"] - less
    assert report.count.misses == 0
    assert all(0 < line["taught"] <= line["trained_tokens"] for line in lines)
    assert report.across is not None and report.across["method"] == method
    page = (tmp_path / "o" / "report.html").read_text(encoding="utf-8")
    assert html.escape(report.across["teaches"]) in page
    assert "of trained positions, by a teacher with another tokenizer" in page
    load_model(tmp_path / "o")


def test_a_span_of_the_batch_adds_up_the_students_rows(world: World) -> None:
    """kd of the step against the formula, from the student's own log-probs in float64."""
    store = open_store(path(world, SAMPLE))
    student = load_model(other(world))
    head = distill_kernels.split_head(student.model)
    chosen, targets, expected = [], [], []
    for one, its in pairs(world)[:3]:
        own = spell(one.token_ids, vocabulary_of(its_own()))
        theirs = spell(its.token_ids, vocabulary_of(tiny_tokenizer()))
        asked = span_asked(its.token_ids, by_text(own, theirs))
        sequence = replace(one, asked=asked)
        stored = store.get(its.token_ids)
        assert stored is not None
        target = asked.shifted(stored)
        chosen.append(sequence)
        targets.append(target)
        logits = np.array(student.model(mx.array(one.token_ids[None, :-1]))[0], np.float64)
        q = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
        y_s = dict.fromkeys(set(asked.spans.tolist()) - {-1}, 0.0)
        for t, last in enumerate(asked.spans.tolist()):
            if last >= 0:
                y_s[last] += q[t, one.token_ids[t + 1]]
        for last in sorted(y_s):
            a, b = (np.exp((y - 1e-6) / 100) for y in (float(target.label_log_prob[last]), y_s[last]))
            expected.append(100 * (a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))))
    batch = collate(chosen, targets, Weighing(1.0, "error"))
    assert batch is not None
    kd, _ = loss_values(head, SpanLoss(), batch)
    found = np.array(kd)[np.array(batch.kd_weight) > 0]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_a_span_that_is_not_trained_as_a_whole_teaches_nothing(world: World) -> None:
    one, its = pairs(world)[0]
    own = spell(one.token_ids, vocabulary_of(its_own()))
    asked = span_asked(its.token_ids, by_text(own, spell(its.token_ids, vocabulary_of(tiny_tokenizer()))))
    long = next(last for last in asked.spans.tolist() if (asked.spans == last).sum() > 1)
    trained = one.trained.copy()
    trained[long] = False
    stored = open_store(path(world, SAMPLE)).get(its.token_ids)
    assert stored is not None
    batch = collate([replace(one, trained=trained, asked=asked)], [asked.shifted(stored)], Weighing(0.5, "error"))
    assert batch is not None
    rows = np.array(batch.rows)
    inside = (asked.spans[rows] == long) | (asked.spans[rows] == -1)
    assert inside.any()
    assert (np.array(batch.spans)[inside] == -1).all()
    assert (np.array(batch.ce_weight)[inside] == 1).all()
    assert (np.array(batch.ce_weight)[~inside] == 0.5).all()
    assert len(np.unique(np.array(batch.spans)[~inside])) == (np.array(batch.kd_weight) > 0).sum()


def test_entropy_weighs_positions_with_targets_alone(world: World) -> None:
    """Where the two do not meet, the teacher's row there is one of another position."""
    one, its = pairs(world)[0]
    asked, found = mapped(world, TRUNCATED, one, its, naming())
    assert asked.taught.any() and not asked.taught.all() and (found.entropy > 0).all()
    batch = collate([replace(one, asked=asked)], [found], Weighing(0.5, "hard-only", entropy_weight=2.0))
    assert batch is not None
    expected = np.where(asked.taught, 1 + 2 * found.entropy, 1)
    np.testing.assert_allclose(np.array(batch.row_weights), expected, rtol=1e-6)


def test_wordpieces_words_have_lost_their_spaces_so_that_nothing_goes_by_their_names(
    world: World, tmp_path: Path
) -> None:
    """Before ` few` its teacher says `few`, which a student of spaces writes on to the last word."""
    teacher, dataset = tmp_path / "teacher", write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in CORPUS[:2]])
    tokenizer = wordpiece(lowercase=False)
    save_tiny_model(teacher, seed=1, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(teacher)
    store = tmp_path / "store.zarr"
    world.build(store, teacher=str(teacher), dataset=str(dataset), select=TRUNCATED)
    usual = {"dataset": str(dataset), "on_miss": "hard-only", "teacher_tokenizer": str(teacher), "iters": 1}
    said: list[str] = []
    train(world.config(tmp_path / "o", store=(str(store),), **usual), said.append)
    assert "--cross-vocab auto takes span: one of the two tokenizers drops the spaces" in "\n".join(said)
    for method in ("mapped", "gold"):
        with pytest.raises(IncompatibleStoreError, match=f"{method} goes by the bytes.* type --cross-vocab span"):
            world.train(tmp_path / method, store=(str(store),), cross_vocab=method, **usual)
    shares = f"{path(world, TRUNCATED)}=0.5", f"{store}=0.5"
    with pytest.raises(IncompatibleStoreError, match=r"goes by the bytes.* type --store of that teacher alone"):
        world.train(tmp_path / "several", store=shares, dataset=str(dataset))


def test_a_step_where_nothing_meets_has_no_distillation_loss(world: World, tmp_path: Path) -> None:
    """Its positions are hits, for the store knows the document."""
    dataset = write_jsonl(tmp_path / "a.jsonl", [{"prompt": CORPUS[0][:-1], "completion": CORPUS[0][-1]}])
    world.build(tmp_path / "store.zarr", dataset=str(dataset), select=TRUNCATED)
    student = save_tiny_model(tmp_path / "s", vocab_size=259)
    tokenizer = tiny_tokenizer(259)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(student)
    options = {"student": str(student), "store": (str(tmp_path / "store.zarr"),), "dataset": str(dataset)}
    for method in ("mapped", "span"):
        _, lines = world.train(
            tmp_path / method, cross_vocab=method, min_coverage=0.0, iters=2, alpha="0.9->0", **options
        )
        assert lines[-1]["alpha"] == 0
        assert [line["taught"] for line in lines][-1] == 0
        assert [line["kd_loss"] is None for line in lines] == [line["taught"] == 0 for line in lines]


def test_auto_takes_mapped_where_it_carries_half_over_and_spans_elsewhere_and_says_why(
    world: World, tmp_path: Path
) -> None:
    tiny_tokenizer(380).save_pretrained(save_tiny_model(tmp_path / "near", seed=5, vocab_size=380))
    tiny_tokenizer(262).save_pretrained(save_tiny_model(tmp_path / "far", seed=5, vocab_size=262))
    for student, method in ((tmp_path / "near", "mapped"), (tmp_path / "far", "span")):
        said: list[str] = []
        store = (str(path(world, SAMPLE)),)
        train(world.config(tmp_path / f"{method}-out", student=str(student), store=store, iters=1), said.append)
        told = "\n".join(said)
        assert f"--cross-vocab auto takes {method}: mapped teaches" in told
        assert f"--cross-vocab {method} teaches" in told
        assert "the teacher's tokenizer is another one" in told


def test_a_run_says_which_share_of_positions_and_of_named_mass_it_teaches(world: World, tmp_path: Path) -> None:
    """`uld` reads no names; of `gold` exact ones count, at the end of each span."""
    own, theirs = vocabulary_of(its_own()), vocabulary_of(tiny_tokenizer())
    spelled, trained, inside, masses = set(own.tokens), 0, 0, []
    for one, its in pairs(world):
        stored = open_store(path(world, TRUNCATED)).get(its.token_ids)
        assert stored is not None
        asked = span_asked(its.token_ids, by_text(spell(one.token_ids, own), spell(its.token_ids, theirs)))
        trained, inside = trained + len(one.trained), inside + np.count_nonzero(asked.spans >= 0)
        for last in set(asked.spans.tolist()) - {-1}:
            row = asked.positions[last]
            named = np.array([theirs.tokens[i] in spelled for i in stored.ids[row]])
            masses.append(stored.weights[row][named].sum() / stored.weights[row].sum())
    of_names = f", with names for {100 * np.mean(masses):.1f} % of"
    for method, positions, then in (
        ("uld", len(masses), ", in"),
        ("gold", inside, of_names),
    ):  # each span begins at one
        said: list[str] = []
        options = {"student": str(other(world)), "store": (str(path(world, TRUNCATED)),), "cross_vocab": method}
        train(world.config(tmp_path / method, **options, min_coverage=0.3, iters=1), said.append)
        assert f"{method} teaches {100 * positions / trained:.1f} % of trained positions{then}" in "\n".join(said)


def test_texts_that_no_store_holds_are_named_and_counted_as_misses(world: World, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in (*CORPUS, "a text that nobody was asked about")])
    said: list[str] = []
    config = world.config(
        tmp_path / "o",
        student=str(other(world)),
        store=(str(path(world, SAMPLE)),),
        dataset=str(tmp_path),
        on_miss="hard-only",
        iters=4,
    )
    report = train(config, said.append)
    assert "1 of 7 documents have a text that no store begins with: train.jsonl:7" in "\n".join(said)
    assert report.count.misses > 0


def test_a_document_that_is_cut_or_goes_on_is_answered_as_far_as_the_texts_agree(world: World) -> None:
    student, teacher = vocabulary_of(its_own()), vocabulary_of(tiny_tokenizer())
    one, its = pairs(world)[1]
    whole = spell(its.token_ids, teacher)
    for cut in (5, 9):
        ids = one.token_ids[:cut]
        asked = mapped_asked(its.token_ids, by_text(spell(ids, student), whole), naming(), unbiased=True)
        assert asked.answered(len(its.token_ids) - 1) == cut - 1
    shorter = its.token_ids[:8]
    own = spell(one.token_ids, student)
    asked = mapped_asked(shorter, by_text(own, spell(shorter, teacher)), naming(), unbiased=True)
    answered = asked.answered(7)
    assert asked.taught is not None
    last = np.flatnonzero(asked.taught[:answered])[-1]
    assert whole.ends[5] <= own.ends[last] <= whole.ends[6]  # of positions 0 to 6
    assert own.ends[answered - 1] <= whole.ends[7] <= own.ends[answered]


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"cross_vocab": "mapped", "min_coverage": 0.9}, ConfigError, r"at least 0.9; type --min-coverage 0.[5-8]"),
        ({"teacher_tokenizer": "{other}"}, IncompatibleStoreError, "was built with tokenizer .*, --teacher-tokenizer "),
        (
            {"teacher": "{other}"},
            IncompatibleStoreError,
            "was built with tokenizer .*, --teacher .* type --teacher with",
        ),
        ({"on_policy": 0.5, "teacher": "{teacher}"}, ConfigError, "and --on-policy needs the teacher's; leave it out"),
        (
            {"teacher_tokenizer": "x", "teacher": "y"},
            ConfigError,
            "--teacher has its own; type it with --store, without",
        ),
        ({"hidden_loss": "mse"}, ConfigError, "--hidden-loss needs"),
        ({"filter": ("nll<3",)}, ConfigError, "nll of a document needs"),
        ({"loss": ("jsd",), "cross_vocab": "mapped", "min_coverage": 0.1}, IncompatibleStoreError, "cannot serve"),
        ({"loss": ("soft-ce",), "cross_vocab": "span"}, IncompatibleStoreError, "span has a loss of its own"),
        ({"loss": ("soft-ce",), "cross_vocab": "uld"}, IncompatibleStoreError, "uld has a loss of its own"),
        ({"loss": ("kl=0.5",), "cross_vocab": "gold"}, IncompatibleStoreError, "gold has a loss of its own"),
        ({"cross_vocab": "uld"}, IncompatibleStoreError, "threshold:16.*build --select top-k:50"),
        ({"cross_vocab": "gold"}, IncompatibleStoreError, "threshold:16.*build --select top-k:50"),
        ({"cross_vocab": "span", "alpha": 0.0}, ConfigError, "--cross-vocab says how to learn from a teacher"),
        ({"cross_vocab": "maped"}, ConfigError, r"is maped; type --cross-vocab auto\|mapped\|span\|uld\|gold"),
        ({"min_coverage": 2.0}, ConfigError, "min_coverage is 2.0, expected 0 to 1"),
    ],
)
def test_what_does_not_go_across_is_refused(
    world: World, tmp_path: Path, options: dict[str, Any], kind: type[LogitstoreError], expected: str
) -> None:
    places = {"other": other(world), "teacher": world.teacher}
    options = {name: v.format(**places) if isinstance(v, str) else v for name, v in options.items()}
    with pytest.raises(kind, match=expected):
        world.train(tmp_path / "o", student=str(other(world)), store=(str(path(world, SAMPLE)),), **options)
    assert not (tmp_path / "o").exists()


def test_spans_are_refused_another_temperature_and_labels_that_nobody_knows(world: World, tmp_path: Path) -> None:
    """A store's label log-probs are of temperature 1, and an imported one may not have them."""
    world.build(tmp_path / "store.zarr", select=TRUNCATED, temperature=(2.0,))
    options = {"student": str(other(world)), "store": (str(tmp_path / "store.zarr"),), "cross_vocab": "span"}
    world.train(tmp_path / "untyped", **options)
    with pytest.raises(IncompatibleStoreError, match=r"of temperature 1, and --temperature is 2; leave"):
        world.train(tmp_path / "o", **options, temperature="2")
    store = open_store(tmp_path / "store.zarr")
    store.__dict__["manifest"] = replace(store.manifest, imported="dwq", unknown=(UNKNOWN_LABEL,))
    read, student = sequences(its_own(), world), load_model(other(world))
    for method in ("span", "gold", "mapped"):
        config = world.config(tmp_path / "o", **options | {"cross_vocab": method, "min_coverage": 0.1})
        asked = (config, in_order([store]), student, SMALL + 20, read, print)
        if method == "mapped":
            assert crossing_of(*asked) is not None
        else:
            with pytest.raises(IncompatibleStoreError, match="imported from dwq, which keeps no log-prob of a label"):
                crossing_of(*asked)


def test_of_many_documents_that_begin_alike_the_one_that_goes_on_alike_is_found(tmp_path: Path) -> None:
    """As chats under one system prompt do, which two tokenizers cut at other places."""
    world = World(tmp_path)
    save_tiny_model(world.teacher, seed=1, layers=1)
    numbers = np.random.default_rng(0).permutation(150).tolist()
    write_jsonl(world.data, [{"text": 9 * "You are careful. " + f"What is {n:03} and then some"} for n in numbers])
    world.build(world.store, select="top-k:4")
    texts = Texts([open_store(world.store)], b"", quiet=True)
    for sequence in sequences(tiny_tokenizer(), world):
        cut = sequence.token_ids[:-5]
        found = texts.find(replace(sequence, token_ids=cut), spell(cut, vocabulary_of(tiny_tokenizer())))
        assert found is not None
        assert np.array_equal(found[0], sequence.token_ids)


def test_a_live_sample_is_no_order_and_what_it_may_keep_instead_is_named(world: World, tmp_path: Path) -> None:
    options = {"student": str(other(world)), "teacher": str(world.teacher), "min_coverage": 0.1}
    for asked, why in (
        ({"cross_vocab": "uld"}, r"threshold:16.*"),
        ({"cross_vocab": "mapped", "loss": ("jsd",)}, "a sample needs its entries' own probabilities"),
    ):
        with pytest.raises(IncompatibleStoreError, match=f"{why}; type --select top-k:50, or --"):
            world.train(tmp_path / "o", **options, **asked)


def test_another_dataset_than_the_stores_is_named_as_what_is_wrong(world: World, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} texts that nobody was asked about"} for i in range(3)])
    options = {"student": str(other(world)), "store": (str(path(world, SAMPLE)),), "dataset": str(data)}
    with pytest.raises(ConfigError, match=r"--store with one of these texts \(no store .* of 3 of 3 documents\)"):
        world.train(tmp_path / "o", **options)


def test_across_a_sample_serves_linear_losses_alone_though_it_keeps_its_tail(world: World, tmp_path: Path) -> None:
    world.build(tmp_path / "tails.zarr", select=SAMPLE, tail_log_probs=True)
    options = {"student": str(other(world)), "store": (f"{tmp_path}/tails.zarr",), "min_coverage": 0.1}
    with pytest.raises(IncompatibleStoreError, match="--loss jsd is not served across tokenizers by a sample"):
        world.train(tmp_path / "o", **options, loss=("jsd",), cross_vocab="mapped")


def test_a_prompt_of_the_students_own_does_not_go_across(world: World, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": text[:9], "completion": text[9:]} for text in CORPUS])
    options = {"student": str(other(world)), "store": (str(path(world, SAMPLE)),), "dataset": str(tmp_path)}
    with pytest.raises(ConfigError, match="a prompt of the teacher's own needs the teacher's"):
        world.train(tmp_path / "o", **options, student_prompt_template="Q: {input}")


@pytest.mark.parametrize(
    ("method", "select"), [("mapped", SAMPLE), ("span", SAMPLE), ("uld", TRUNCATED), ("gold", TRUNCATED)]
)
def test_a_run_across_is_resumed_to_the_last_bit(world: World, tmp_path: Path, method: str, select: str) -> None:
    options = {
        "student": str(other(world)), "store": (str(path(world, select)),), "cross_vocab": method, "min_coverage": 0.3,
    }  # fmt: skip
    _, whole = world.train(tmp_path / "whole", **options, iters=4)
    world.train(tmp_path / "o", **options, iters=2, save_every=2)
    _, parts = world.train(tmp_path / "o", **options, iters=4, resume=True, save_every=2)
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]


def test_nothing_is_crossed_between_equal_tokenizers(world: World) -> None:
    config = world.config(world.folder / "none", store=(str(path(world, SAMPLE)),))
    teachers = in_order([open_store(path(world, SAMPLE))])
    assert crossing_of(config, teachers, load_model(world.student), 384, world.sequences(), print) is None


@pytest.mark.parametrize("method", ["span", "uld", "gold"])
def test_a_loss_of_crossing_is_refused_between_equal_tokenizers(world: World, tmp_path: Path, method: str) -> None:
    for source in ({"store": (str(path(world, TRUNCATED)),)}, {"teacher": str(world.teacher), "select": TRUNCATED}):
        with pytest.raises(ConfigError, match=f"{method} is for a teacher of another tokenizer.* leave --cross-vocab"):
            world.train(tmp_path / "o", cross_vocab=method, **source)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("select", "method"),
    [
        (SAMPLE, "mapped"),
        (TRUNCATED, "mapped"),
        (SAMPLE, "span"),
        (TRUNCATED, "span"),
        (TRUNCATED, "uld"),
        (TRUNCATED, "gold"),
    ],
)
def test_a_live_teacher_of_another_tokenizer_teaches_what_its_store_does(
    world: World, tmp_path: Path, select: str, method: str
) -> None:
    usual = LEARNING | {"student": str(other(world)), "cross_vocab": method, "dataset": str(world.folder)}
    held_out = {"valid_split": "valid", "steps_per_eval": 5}
    curves = []
    for name, source in (
        ("stored", {"store": (str(path(world, select)),)}),
        ("live", {"teacher": str(world.teacher), "select": select}),
    ):
        report, lines = world.train(tmp_path / name, **usual, **held_out, **source)
        curves.append([(line["loss"], line["taught"]) for line in lines])
        assert (report.count.hits == 0) == (name == "live")
        assert lines[-1]["valid_misses" if name == "live" else "valid_hits"] > 0
    for (stored, taught), (live, taught_live) in zip(*curves, strict=True):
        assert live == pytest.approx(stored, abs=1e-4)
        assert taught_live == taught


def test_misses_across_are_answered_kept_and_missed_no_more(world: World, tmp_path: Path) -> None:
    world.build(tmp_path / "few.zarr", select=SAMPLE, limit=2)
    usual = LEARNING | {"student": str(other(world)), "cross_vocab": "mapped"}
    whole = world.train(tmp_path / "whole", store=(str(path(world, SAMPLE)),), **usual)[1]
    kept = {"store": (str(tmp_path / "few.zarr"),), "teacher": str(world.teacher)}
    report, lines = world.train(tmp_path / "o", write_back=True, **kept, **usual)
    assert report.count.misses > 0
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole], abs=1e-4)
    again, _ = world.train(tmp_path / "again", store=(str(tmp_path / "few.zarr"),), **usual)
    assert again.count.misses == 0


QUESTIONS = [
    {"messages": [{"role": "user", "content": f"How many? Small {n}."}, {"role": "assistant", "content": text}]}
    for n, text in enumerate(("Small: a few bytes.", "Small 1.", "It held 1234567890 positions.", "Où est l'école?"))
]
QUESTIONS[2]["messages"] += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "It held more."}]


@pytest.fixture(scope="module")
def chats(world: World) -> Path:
    """A chat dataset, the teacher's store of it, and a student whose template writes turns otherwise."""
    folder = world.folder / "chats"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", QUESTIONS)
    world.build(folder / "store.zarr", dataset=str(folder / "train.jsonl"), select=TRUNCATED)
    tokenizer = its_own()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    save_tiny_model(folder / "student", seed=5, vocab_size=SMALL)
    tokenizer.save_pretrained(folder / "student")
    return folder


def test_chats_of_two_templates_are_aligned_turn_by_turn(chats: Path) -> None:
    """What is left of a turn after a position is the same text on both sides, and the end of a turn is its end."""
    one = load_tokenizer(str(chats / "student"), "--student")
    vocabularies = vocabulary_of(one), vocabulary_of(tiny_tokenizer())
    rows = lambda: read_documents(str(chats / "train.jsonl"))  # noqa: E731
    readings = Readings(rows(), tiny_tokenizer(), vocabularies[0].special_ids, b"", quiet=True)
    taught = 0
    for sequence, read in zip(tokenize(rows(), one, 512), tokenize(rows(), tiny_tokenizer(), 512), strict=True):
        found = readings.find(sequence, spell(sequence.token_ids, vocabularies[0]))
        assert found is not None
        token_ids, alignment = found
        assert (token_ids == read.token_ids[: len(token_ids)]).all()

        def rest(s: TokenSequence, position: int, vocabulary: Any) -> bytes:
            """Of the turn."""
            found = []
            for t in range(position + 1, len(s.token_ids)):
                if int(s.token_ids[t]) in vocabulary.special_ids or not s.trained[t - 1]:
                    break
                found.append(vocabulary.tokens[s.token_ids[t]])
            return b"".join(found)

        for position in np.flatnonzero(sequence.trained).tolist():
            there = alignment.met[position]
            if there >= 0 and int(sequence.token_ids[position]) not in vocabularies[0].special_ids:
                assert read.trained[there]
                assert rest(sequence, position, vocabularies[0]) == rest(read, there, vocabularies[1])
                taught += 1
        closings = [t for t in range(1, len(sequence.token_ids)) if sequence.token_ids[t] == one.eos_token_id]
        assert all(read.token_ids[alignment.met[t]] == tiny_tokenizer().eos_token_id for t in closings)
    assert taught > 30


def test_chats_are_found_in_a_store_with_the_teachers_tokenizer_and_without_it_are_misses(
    world: World, chats: Path, tmp_path: Path
) -> None:
    usual = LEARNING | {"student": str(chats / "student"), "dataset": str(chats), "store": (str(chats / "store.zarr"),)}
    report, lines = world.train(
        tmp_path / "o",
        teacher_tokenizer=str(world.teacher),
        valid_dataset=str(chats / "train.jsonl"),
        **usual,
    )
    assert report.count.misses == 0
    assert lines[-1]["taught"] > 0
    said: list[str] = []
    train(world.config(tmp_path / "p", on_miss="hard-only", **usual | {"min_coverage": 0.0}), said.append)
    assert "4 of 4 documents have a text that no store begins with" in "\n".join(said)


def test_turns_of_other_text_are_no_turns_and_a_cut_one_is_a_beginning() -> None:
    def made(text: str, template: str, length: int = 99) -> tuple[TokenSequence, Spelled]:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        rows = [
            Document({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}, "1")
        ]
        (sequence,) = tokenize(rows, tokenizer, length)
        return sequence, spell(sequence.token_ids, vocabulary_of(tokenizer))

    first = CHAT_TEMPLATE
    second = first.replace("'\n' + message['content']", "': ' + message['content']").replace(
        "assistant\n", "assistant: "
    )
    special = vocabulary_of(tiny_tokenizer()).special_ids

    def aligned(one: tuple[TokenSequence, Spelled], other: tuple[TokenSequence, Spelled]) -> Alignment | None:
        return by_turns(one[1], turns(one[0], special), other[1], turns(other[0], special))

    whole = made("a few bytes for every position", first)
    same = aligned(made("a few bytes for every position", second), whole)
    assert same is not None
    assert (same.met >= 0).sum() > 5
    assert aligned(made("a few bytes for any position", second), whole) is None
    cut = made("a few bytes for every position", second, length=23)
    assert turns(cut[0], special)[0].closing == -1
    assert aligned(cut, whole) is not None
    assert aligned(whole, cut) is None

    spaced = made("a few bytes for every position", first.replace("+ '<|im_end|>'", "+ ' <|im_end|>'"))
    one, other = spaced, whole
    found = aligned(one, other)
    assert found is not None
    (turn,), (theirs,) = turns(one[0], special), turns(other[0], special)
    assert found.met[turn.closing] == -1  # after the text one goes on with a space, the other ends
    last = int(np.flatnonzero(found.met >= 0)[-1])
    assert one[1].text[: one[1].ends[last]].endswith(other[1].text[: other[1].ends[found.met[last]]][-8:])
    assert one[1].ends[last] < one[1].ends[turn.stop - 1] - 1
    assert found.met[last] < theirs.stop - 1
    alike = aligned(spaced, made("a few bytes for every position", second.replace("+ '<|im_end|>'", "+ ' <|im_end|>'")))
    assert alike is not None and alike.met[turn.closing] >= 0


def test_in_a_turn_a_token_that_the_teacher_passes_over_meets_nothing_a_second_time() -> None:
    """A control character that SmolLM2 has no token for: what is left of the turn after a meeting is the same text."""
    second = CHAT_TEMPLATE.replace("'\n' + message['content']", "': ' + message['content']")
    second = second.replace("assistant\n", "assistant: ")
    spelled, read = [], []
    for text, template in (("a few\x05\x05 bytes\x05", second), ("a few bytes", CHAT_TEMPLATE)):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        read += tokenize([Document({"messages": said}, "1")], tokenizer, 99)
        spelled.append(spell(read[-1].token_ids, vocabulary_of(tokenizer), b"\x05"))
    special = vocabulary_of(tiny_tokenizer()).special_ids
    found = by_turns(spelled[0], turns(read[0], special), spelled[1], turns(read[1], special))
    assert found is not None
    met = found.met[found.met >= 0]
    assert len(met) > 5
    assert (np.diff(met) > 0).all()
    lost = np.flatnonzero(read[0].token_ids == tiny_tokenizer().encode("\x05")[0])
    assert len(lost) == 3
    assert (found.met[lost - 1] == -1).all()
    assert (found.met[lost[1:]] >= 0).all()


def test_a_prompt_that_is_trained_too_is_never_taken_for_what_the_assistant_said() -> None:
    said = [{"role": role, "content": "a few bytes"} for role in ("user", "assistant")]
    one, teacher = its_own(), tiny_tokenizer()
    one.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    vocabulary = vocabulary_of(one)
    for mask_prompt in (True, False):
        rows = [Document({"messages": said}, "1")]
        (sequence,) = tokenize(rows, one, 512, mask_prompt=mask_prompt)
        readings = Readings(rows, teacher, vocabulary.special_ids, b"", quiet=True, mask_prompt=mask_prompt)
        found = readings.find(sequence, spell(sequence.token_ids, vocabulary))
        assert (found is not None) == mask_prompt


def prompts(folder: Path) -> Path:
    rows = [{"prompt": f"How many {n}?", "completion": text} for n, text in enumerate(CORPUS)]
    return write_jsonl(folder / "train.jsonl", rows)


def test_a_prompt_template_that_both_have_is_read_by_the_teachers_tokenizer_too(world: World, tmp_path: Path) -> None:
    template = "Answer briefly. {input} Now."
    templates = {"teacher_prompt_template": template, "student_prompt_template": template}
    data, store = str(prompts(tmp_path)), tmp_path / "store.zarr"
    world.build(store, dataset=data, select=TRUNCATED, prompt_template=template)
    usual = LEARNING | templates | {"student": str(other(world)), "dataset": data, "store": (str(store),)}
    report, _ = world.train(tmp_path / "o", **usual, teacher_tokenizer=str(world.teacher))
    assert report.count.misses == 0


def test_a_document_that_is_cut_before_a_stores_first_beginning_is_found_with_the_teachers_tokenizer(
    world: World, tmp_path: Path
) -> None:
    usual = LEARNING | {"student": str(other(world)), "max_seq_length": 20, "store": (str(path(world, SAMPLE)),)}
    report, _ = world.train(tmp_path / "o", **usual, teacher_tokenizer=str(world.teacher))
    assert report.count.misses == 0


@pytest.mark.parametrize("method", ["mapped", "span", "uld", "gold"])
def test_what_a_template_writes_after_a_turn_is_no_target_and_no_miss(
    world: World, tmp_path: Path, method: str
) -> None:
    """The student's ends with a newline that it is trained on, the teacher's with the end of the turn."""
    teacher = save_tiny_model(tmp_path / "teacher", seed=1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
    tokenizer.save_pretrained(teacher)
    data, store = str(prompts(tmp_path)), tmp_path / "store.zarr"
    world.build(store, teacher=str(teacher), dataset=data, select=TRUNCATED)
    student, said = load_model(other(world)), lambda _: None
    config = world.config(
        tmp_path / "o",
        **LEARNING
        | {"student": str(other(world)), "dataset": data, "store": (str(store),)}
        | {"cross_vocab": method, "teacher_tokenizer": str(teacher)},
    )
    read = list(tokenize(read_documents(data), its_own(), 512))
    crossing = crossing_of(config, in_order([open_store(store)]), student, SMALL + 20, read, said)
    assert crossing is not None
    for sequence in crossing.over(read, said):
        assert sequence.trained[-1]
        assert sequence.token_ids[-2] == its_own().eos_token_id
        assert sequence.asked is not None
        assert sequence.asked.taught is not None
        assert sequence.asked.taught.any()
        assert not sequence.asked.taught[-1]
    assert train(config).count.misses == 0


def test_a_chat_that_the_teachers_template_refuses_is_said_to_be_the_teachers(world: World, tmp_path: Path) -> None:
    teacher = save_tiny_model(tmp_path / "teacher", seed=1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    tokenizer.save_pretrained(teacher)
    options = {"student": str(other(world)), "dataset": str(prompts(tmp_path)), "teacher": str(teacher)}
    expected = "as the teacher reads it, train.jsonl:1: the chat template refuses the messages: no system turns"
    with pytest.raises(DatasetError, match=expected):
        world.train(tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()
