"""Subjects on a page: a hash with a salt that is on no page, or, where it was asked for, their ids."""

import hashlib
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from cauc_dist.provenance import without_secrets

DIGITS = 12
TOKEN = re.compile(r"[\w.-]+")
PARTS = re.compile(r"([._-])")
SHORT_NUMBER = re.compile(r"\d{1,4}")


@dataclass
class Hidden:
    """Names for subjects and scans. `salt`: 16 random bytes, drawn for each page and written nowhere.

    Without the salt a hash cannot be found by hashing all ids there are, and two pages cannot be laid side by side.
    """

    show_ids: bool = False
    salt: bytes = field(default_factory=lambda: os.urandom(16), repr=False)
    known: set[str] = field(default_factory=set, repr=False)
    """Ids of the stores of this page: `scrub` looks for them."""
    _stores: set[str] = field(default_factory=set, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _odd: list[str] = field(default_factory=list, init=False, repr=False)
    """Ids that are not one word, the longest first."""

    def __call__(self, name: str) -> str:
        if self.show_ids:
            return name
        return hashlib.sha256(self.salt + name.encode()).hexdigest()[:DIGITS]

    def knows(self, store: str, *names: Iterable[str]) -> None:
        """The ids of a store, by its fingerprint: of one that is known already nothing is read."""
        with self._lock:  # of the thread that makes maps, and of those that answer
            if store not in self._stores:
                self.known |= {str(name) for of in names for name in of}
                self._odd = sorted((n for n in self.known if n and not TOKEN.fullmatch(n)), key=len, reverse=True)
                self._stores.add(store)

    def scrub(self, text: str) -> str:
        """The same text with each known id in it hidden, also where it is a part of a file's name; URLs lose secrets.

        Numbers of up to four digits stay: as ids they are as good as hidden among settings, and could be any of these.
        """
        text = without_secrets(text)
        if self.show_ids:
            return text
        for name in self._odd:
            text = text.replace(name, self(name))
        return TOKEN.sub(lambda found: self._word(found[0]), text)

    def _word(self, word: str) -> str:
        """The longest run of its parts (between `.`, `_` and `-`) that is an id, hidden; then what is left of it."""
        parts = PARTS.split(word)
        for length in range(len(parts), 0, -2):
            for start in range(0, len(parts) - length + 1, 2):
                name = "".join(parts[start : start + length])
                if name in self.known and not SHORT_NUMBER.fullmatch(name):
                    before, after = "".join(parts[:start]), "".join(parts[start + length :])
                    return self._word(before) + self(name) + self._word(after)
        return word
