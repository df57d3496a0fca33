import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.units import GIB, KIB, MIB, format_bytes, format_rate, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("900MiB", 900 * MIB),
        ("80GB", 80 * 10**9),
        ("1.5 GiB", 3 * GIB // 2),
        (" 4 KiB ", 4 * KIB),
        ("2TiB", 2 * 1024 * GIB),
        ("7", 7),
        (4096, 4096),
        ("1B", 1),
        ("3kB", 3000),
        ("3KB", 3000),
        ("5MB", 5_000_000),
        ("6TB", 6 * 10**12),
    ],
)
def test_parse_bytes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1e9", "1 gib", "1XB", "1 2", "0", "0.0GiB", "0.4", "nan", "1,5GiB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size is"):
        parse_bytes(text)


@given(st.integers(1, 2**53), st.sampled_from(["", "B"]))
def test_plain_bytes_are_exact(size: int, unit: str) -> None:
    assert parse_bytes(f"{size}{unit}") == size


@given(st.integers(1, 2**53))
def test_what_is_printed_can_be_read_and_is_near(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (int(61.3 * GIB), "61.3 GiB"),
        (900 * MIB, "900 MiB"),
        (1024 * GIB, "1.0 TiB"),
        (-2 * GIB, "-2.0 GiB"),
    ],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.31, "0.31 s"),
        (42, "42 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
        (3599.9, "1 h 00 min"),
        (86_400, "24 h 00 min"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(13_100, "13 100"), (0.4, "0"), (999.6, "1 000"), (1_234_567, "1 234 567")])
def test_format_rate(rate: float, text: str) -> None:
    assert format_rate(rate) == text
