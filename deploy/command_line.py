"""Command line: the words after `diccae`, as a job or a manifest holds them.

Knows nothing of what any option means.
"""

from collections.abc import Sequence


def values_of(words: Sequence[str], option: str) -> list[str]:
    """What an option is given, as `--out X` or `--out=X`, in order; of several the last counts."""
    found = []
    for i, word in enumerate(words):
        if word == option and i + 1 < len(words):
            found.append(words[i + 1])
        elif word.startswith(f"{option}="):
            found.append(word.partition("=")[2])
    return found
