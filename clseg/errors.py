"""What is wrong with a request or with data, in one sentence."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # and what breaks a line


class RequestError(Exception):
    """The request or the data are wrong: one sentence, on one line, that names the file or key and what to do."""

    def __init__(self, sentence: str) -> None:
        sentence = sentence if len(sentence) < 900 else f"{sentence[:700]} ... {sentence[-150:]}"
        super().__init__(UNPRINTABLE.sub(lambda character: ascii(character[0])[1:-1], sentence))


@contextmanager
def reading(path: Path | str, kind: str, remedy: str = "replace the file") -> Iterator[None]:
    """Make one sentence of what a library raises on a file that is absent or damaged; that can be almost anything."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:150] or type(error).__name__
        where = getattr(error, "filename", None) or path
        raise RequestError(f"{where}: cannot be read or is not valid {kind} ({reason}); {remedy}") from None


@contextmanager
def writing(path: Path | str, remedy: str) -> Iterator[None]:
    """Make one sentence of what the machine refuses, such as a folder without permission or a full disk."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from None


def once(sentences: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Of sentences that differ only in numbers and in the names given with each, the first, and how many there are."""
    kinds: dict[str, list[str]] = {}
    for sentence, names in sentences:
        kind = sentence
        for name in sorted(names, key=len, reverse=True):
            kind = kind.replace(name, "*")
        kinds.setdefault(re.sub(r"[-+.\de]*\d+", "#", kind), []).append(sentence)
    return [some[0] + f" ({len(some)} such files, this is the first)" * (len(some) > 1) for some in kinds.values()]


def repeated(values: Iterable[str]) -> list[str]:
    """The values that are there more than once, sorted."""
    return sorted(value for value, count in Counter(values).items() if count > 1)


def nearest(name: str, valid: Iterable[str]) -> str:
    """'did you mean X?' for the nearest valid name, or the list of valid names when none is near."""
    valid = sorted(map(str, valid))
    match = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"valid are {', '.join(valid)}"
