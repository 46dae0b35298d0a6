from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from logitstore.documents import read_documents
from logitstore.errors import DatasetError, ModelError
from logitstore.key import document_key
from logitstore.plan import Part
from logitstore.sequences import TokenizeReport, tokenize
from logitstore.survey import Survey, take_survey
from tests.runs import write_jsonl
from tests.stores import small_store, tokens
from tests.tiny import CORPUS, tiny_tokenizer


def survey(path: Path, vocab_size: int = 384) -> Survey:
    return take_survey(read_documents(str(path)), tiny_tokenizer(), 20, vocab_size, "tiny", quiet=True)


def test_the_different_documents_are_counted_in_their_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in (*CORPUS, CORPUS[2], CORPUS[0])])
    found = survey(path)
    sequences = list(tokenize(read_documents(str(path)), tiny_tokenizer(), 20))[: len(CORPUS)]
    assert found.report.documents == len(CORPUS) + 2
    assert [key.tobytes() for key in found.keys] == [document_key(s.token_ids) for s in sequences]
    assert found.positions.tolist() == [len(s.trained) for s in sequences]


def test_what_a_store_holds_and_other_parts_do_is_not_to_do(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", shards=1)
    keys = np.stack([np.frombuffer(document_key(tokens(i, n)), np.uint8) for i, n in enumerate((7, 2, 30, 9, 9))])
    found = Survey(TokenizeReport(), keys, np.ones(5, np.uint32))
    assert found.to_do(Part(), None).tolist() == [0, 1, 2, 3, 4] and found.to_do(Part(), store).tolist() == [3, 4]
    parts = [found.to_do(Part(i, 3), store).tolist() for i in (1, 2, 3)]
    assert sorted(chain(*parts)) == [3, 4]


def test_a_malformed_row_at_the_end_and_an_unknown_token_are_found_before_the_teacher_reads(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": CORPUS[0]}] * 3 + [{"txt": ""}])
    with pytest.raises(DatasetError, match=r"d\.jsonl:4"):
        survey(path)
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": CORPUS[0]}])
    with pytest.raises(ModelError, match="knows 50 tokens"):
        survey(path, vocab_size=50)
