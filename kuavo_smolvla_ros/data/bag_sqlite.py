"""rosbag2's sqlite3 files, read row by row in the order of writing."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kuavo_smolvla_ros.data.bag_storage import BagError, Channel, Contents, Entry, Place, Wanted
from kuavo_smolvla_ros.data.unpacked import Unpacked

_MAGIC = b"SQLite format 3\0"
_PAGE_SIZE_AT = 16
_FORMATS = {"ros2msg": "msg", "ros2idl": "idl"}


class SqliteStorage:
    """See `bag_storage.Storage`. A place is (row, 0, 0)."""

    def __init__(self, path: Path, survey: bool, _: Unpacked) -> None:
        self.path = path
        self.contents = Contents()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if not path.stat().st_size:
            raise BagError(f"{path}: is empty")
        self._database = self._connect()
        try:
            if survey:
                self._read_topics()
        except sqlite3.DatabaseError as error:
            self.close()
            raise BagError(f"{path}: cannot be read as a sqlite3 recording: {error}") from error
        except BagError:
            self.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        # What a killed recorder left in the write-ahead log is only seen without `immutable`.
        has_log = self.path.with_name(self.path.name + "-wal").exists()
        mode = "mode=ro" if has_log else "mode=ro&immutable=1"
        uri = self._whole_pages().absolute().as_uri() + "?" + mode
        try:
            database = sqlite3.connect(uri, uri=True)
            # Otherwise a file that is shorter than its first page says is refused as a whole.
            database.execute("PRAGMA writable_schema=ON")
        except sqlite3.DatabaseError as error:
            raise BagError(f"{self.path}: cannot be opened as a sqlite3 recording: {error}") from error
        return database

    def _whole_pages(self) -> Path:
        """The file, or a copy without its last page where that was cut: sqlite would read zeros from it."""
        with self.path.open("rb") as source:
            header = source.read(_PAGE_SIZE_AT + 2)
            page = int.from_bytes(header[_PAGE_SIZE_AT:], "big") or 1
            page = 65536 if page == 1 else page
            size = self.path.stat().st_size
            if size % page == 0 or not header.startswith(_MAGIC):
                return self.path
            self._folder = tempfile.TemporaryDirectory(prefix="kuavo_bag_")
            copy = Path(self._folder.name, self.path.name)
            source.seek(0)
            with copy.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.truncate(size // page * page)
            return copy

    def _read_topics(self) -> None:
        tables = {
            row[0] for row in self._database.execute("SELECT name FROM sqlite_master WHERE type='table'")
        }
        if not {"topics", "messages"} <= tables:
            raise BagError(f"{self.path}: is no recording (it has no tables 'topics' and 'messages')")
        definitions: dict[str, tuple[str, str]] = {}
        if "message_definitions" in tables:
            query = "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
            definitions = {name: (encoding, text) for name, encoding, text in self._database.execute(query)}
        for number, topic, type_name, serialization in self._database.execute(
            "SELECT id, name, type, serialization_format FROM topics"
        ):
            encoding, text = definitions.get(type_name, ("", ""))
            self.contents.channels[number] = Channel(
                number, topic, type_name, text, _FORMATS.get(encoding, ""), serialization
            )

    def close(self) -> None:
        self._database.close()
        if self._folder is not None:
            self._folder.cleanup()

    def scan(self, wanted: Wanted) -> Iterator[Entry]:
        last_ns: int | None = None
        chosen = {number: c for number, c in self.contents.channels.items() if wanted(c)}
        if not chosen:
            return
        numbers = ",".join(str(number) for number in chosen)
        query = (
            f"SELECT id, topic_id, timestamp, data FROM messages WHERE topic_id IN ({numbers}) ORDER BY id"
        )
        try:
            for row, number, receive_ns, data in self._database.execute(query):
                last_ns = receive_ns
                yield Entry(chosen[number], receive_ns, memoryview(data), Place(row, 0, 0))
        except sqlite3.DatabaseError as error:
            self.contents.damage(self.path, f"cut off or damaged, read up to there: {error}", last_ns)

    def read(self, place: Place) -> bytes:
        row = self._database.execute("SELECT data FROM messages WHERE id=?", (place.container,)).fetchone()
        return bytes(row[0])
