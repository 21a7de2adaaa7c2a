"""Sizes and shares as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.core.units import human_bytes, parse_bytes, parse_fraction, rounded_up
from edgeship.errors import UsageError


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (95_500, "95.5 kB"),
     (3_000_000_000, "3 GB"),
     (999_499, "999 kB"), (999_500, "1 MB"), (999_999, "1 MB"), (999.6, "1 kB"), (999_700_000_000, "1000 GB"), (12_300_000_000_000, "12300 GB")],
)  # fmt: skip
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text


@given(st.integers(0, 10**15))
def test_people_never_read_an_exponent_and_are_never_far_off(count):
    text = human_bytes(count)
    assert "e" not in text
    number, unit = text.split()
    assert float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit] == pytest.approx(count, rel=0.006, abs=0.5)


@pytest.mark.parametrize(
    ("text", "count"),
    [("3GB", 3 * 10**9), ("850 MB", 850 * 10**6), ("1.5GiB", 3 * 2**29), ("512", 512), ("2kib", 2048), (" 7 b ", 7)],
)
def test_sizes_that_people_write(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "3XB", "-1GB", "0", "0.4B", "1e9", "3GBs", "nan"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="write 3GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "share"), [("1%", 0.01), ("0.5%", 0.005), ("0.01", 0.01), ("0", 0), ("100%", 1), ("1", 1)]
)
def test_shares_that_people_write(text, share):
    assert parse_fraction(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "-1%", "101%", "1.5", "one", "nan"])
def test_what_is_no_share_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="write 1%"):
        parse_fraction(text)


@given(st.integers(1, 10**14))
def test_a_size_that_is_rounded_up_is_no_smaller_and_hardly_larger(count):
    found = parse_bytes(rounded_up(count))
    assert count <= found <= count * 1.011 + 1
