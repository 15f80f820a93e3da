"""English prose that everyone can have, to train on: 4.7 MB of the Debian Administrator's Handbook and the Anarchist FAQ, in turns.

    python -m experiments.healing.prose --out prose.txt

Debian's packages `debian-handbook` (GPL-2+ or CC-BY-SA-3.0) and `anarchism` (GPL-2) are downloaded with apt-get and unpacked with dpkg-deb
into a folder of their own; nothing is installed. --packages FOLDER takes them from there instead. Each paragraph of twelve words or more is
kept once; of the FAQ, which is several times as long, thirty of every ninety.
"""

import argparse
import hashlib
import subprocess
import tempfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = {"debian-handbook": "11.20220922", "anarchism": "15.3-3"}  # versions that the published figures are of
HANDBOOK, FAQ = "usr/share/doc/debian-handbook/html/en-US", "usr/share/doc/anarchism/html"
SHA256 = "d4eb0c97c06a6806ee88610b447850c290c51d822245b09988f52be5b3097deb"  # of what these versions give
WORDS = 12  # of a paragraph, at least
TURN = 30  # paragraphs of the FAQ
TURNS = 60  # of both


class Paragraphs(HTMLParser):
    """The text of all elements of a tag (with a class), in the order in which they end; listings inside are left out."""

    def __init__(self, tag: str, kind: str = "") -> None:
        super().__init__()
        self.found: list[str] = []
        self._tag, self._kind = tag, kind
        self._open: list[tuple[bool, list[str]]] = []
        self._listing = 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if tag == self._tag == "p":  # one that has no end holds a list
            self._open.clear()
        if tag == self._tag:
            self._open.append((not self._kind or ("class", self._kind) in attrs, []))
        self._listing += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self._listing -= tag == "pre"
        if tag == self._tag and self._open:
            asked, parts = self._open.pop()
            if asked:
                self.found.append(" ".join("".join(parts).split()))
            elif self._open:
                self._open[-1][1].extend(parts)

    def handle_data(self, data: str) -> None:
        if self._open and not self._listing:
            self._open[-1][1].append(data)


def paragraphs(folder: Path, tag: str, kind: str = "") -> list[str]:
    """Of all pages, by their names, each paragraph once."""
    found: dict[str, None] = {}
    for page in sorted(folder.glob("*.html")):
        reader = Paragraphs(tag, kind)
        reader.feed(page.read_text(encoding="utf-8", errors="replace"))
        found |= dict.fromkeys(text for text in reader.found if len(text.split()) >= WORDS)
    return list(found)


def in_turns(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Parts of two lists, `TURNS` of each."""
    parts = (
        each[len(each) * turn // TURNS : len(each) * (turn + 1) // TURNS]
        for turn in range(TURNS)
        for each in (one, other)
    )
    return [text for part in parts for text in part]


def prose(root: Path) -> str:
    """Of both packages, unpacked into one folder."""
    handbook, faq = paragraphs(root / HANDBOOK, "div", "para"), paragraphs(root / FAQ, "p")
    third = [text for place, text in enumerate(faq) if place // TURN % 3 == 0]
    return "\n\n".join(in_turns(handbook, third))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("prose.txt"))
    parser.add_argument("--packages", type=Path, help="folder with both .deb files, instead of apt-get")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = options.packages or Path(place)
        if options.packages is None:
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
        for name, version in PACKAGES.items():
            files = sorted(folder.glob(f"{name}_*.deb"))
            if not files:
                parser.error(
                    f"'{folder}' has no package {name}_{version}_all.deb: see https://packages.debian.org/{name}."
                )
            subprocess.run(["dpkg-deb", "-x", files[-1].absolute(), Path(place) / "root"], check=True)
        text = prose(Path(place) / "root").encode()
    options.out.write_bytes(text)
    print(f"{options.out}: {len(text) / 1e6:.1f} MB")
    if hashlib.sha256(text).hexdigest() != SHA256:
        versions = " and ".join(f"{name} {version}" for name, version in PACKAGES.items())
        print(f"Not the text of the published figures, which is of {versions}: other versions were unpacked.")


if __name__ == "__main__":
    main()
