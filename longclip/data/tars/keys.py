"""Which sample keys a data set has already: exact, on disk, so that ten million take no memory.

In: keys one by one. Out: whether each is new, and what was noted with it. A table of SQLite in one file,
which goes when the set is closed; keys are compared whole, so no hash can collide.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

CACHE_KIB = 32 * 1024  # of pages that SQLite keeps in memory


class Keys:
    """A set of texts on disk. Not shared between processes; nothing of it survives `close`.

    Args:
        path: of the file, which is made afresh; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        # No locks: nobody else opens the file, and network disks of clusters have locks that hang.
        # Nothing has to survive a crash: no journal, no waiting for the disk, one endless transaction.
        self._table = sqlite3.connect(f"{path.resolve().as_uri()}?nolock=1", uri=True, isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIB}"):
            self._table.execute(f"PRAGMA {setting}")
        self._table.execute("CREATE TABLE keys (key TEXT PRIMARY KEY, note TEXT) WITHOUT ROWID")
        self._table.execute("BEGIN")

    def add(self, key: str, note: str = "") -> bool:
        """Remember a key; False if it was there already, and then its first note stays."""
        return self._table.execute("INSERT OR IGNORE INTO keys VALUES (?, ?)", (key, note)).rowcount == 1

    def note(self, key: str) -> str:
        """What was noted with a key that is there."""
        found: tuple[str] = self._table.execute("SELECT note FROM keys WHERE key = ?", (key,)).fetchone()
        return found[0]

    def __contains__(self, key: str) -> bool:
        return self._table.execute("SELECT 1 FROM keys WHERE key = ?", (key,)).fetchone() is not None

    def close(self) -> None:
        self._table.close()
        self.path.unlink(missing_ok=True)
