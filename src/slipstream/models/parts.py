"""Names of the files of a GGUF model that is split in several: `model-00001-of-00003.gguf` and so on."""

import re

_PART = re.compile(r"-(?P<index>\d{5})-of-(?P<count>\d{5})(?=\.gguf$)", re.IGNORECASE)


def without_part(file: str) -> str:
    """The name that the model would have in one file."""
    return _PART.sub("", file)


def all_parts(file: str) -> list[str]:
    """The files of the model that `file` is a part of, in order; `file` alone if it's whole."""
    if not (part := _PART.search(file)):
        return [file]
    stem, ending, count = file[: part.start()], file[part.end() :], int(part["count"])
    return [f"{stem}-{index:05}-of-{count:05}{ending}" for index in range(1, count + 1)]
