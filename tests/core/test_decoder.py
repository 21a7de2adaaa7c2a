"""What an artifact of a language model says of itself, as a record and as the strings that older bundles have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.core.decoder import CACHE_BITS, LanguageFacts
from edgeship.core.model import GenaiModel, Signature
from edgeship.core.records import from_plain, to_plain
from edgeship.errors import ArtifactError

sizes = st.integers(1, 2**31)
facts = st.builds(
    LanguageFacts,
    context=sizes,
    cache=st.sampled_from(sorted(CACHE_BITS)),
    eos=st.lists(sizes, max_size=3).map(tuple),
    chunk=st.none() | sizes,
    adapters=st.lists(st.from_regex(r"[a-z][a-z0-9_-]*", fullmatch=True), max_size=3).map(tuple),
)


@given(facts)
def test_strings_and_plain_data_give_the_record_back(record):
    assert LanguageFacts.of_texts(record.texts()) == record
    assert from_plain(LanguageFacts, to_plain(record)) == record


GOOD = LanguageFacts(64, "float16", (1, 2), 8).texts()


@pytest.mark.parametrize(
    "texts",
    [
        {}, {"context": "64"}, {**GOOD, "context": "many"}, {**GOOD, "cache": "float8"}, {**GOOD, "eos": "1,x"},
        {**GOOD, "chunk": ""},
    ],
)  # fmt: skip
def test_strings_that_say_less_are_refused(texts):
    with pytest.raises(ArtifactError, match="its record of a language model lacks"):
        LanguageFacts.of_texts(texts)


def test_an_artifact_without_the_record_is_no_language_model(tmp_path):
    with pytest.raises(ArtifactError, match="is not recorded as a language model"):
        GenaiModel(tmp_path, Signature((), ())).spoken()
    with pytest.raises(ArtifactError, match="how many tokens prefill takes"):
        LanguageFacts(64, "float16").prefilled()
