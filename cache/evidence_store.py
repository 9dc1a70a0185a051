"""What the store keeps about artifacts beside them: who vouches for them, and whether they were found sound."""

import contextlib

from .. import CacheError
from .folder import read_small, write_small
from .open_folder import OpenFolder
from .record import decode, encode
from .signing import SignatureRecord, sign
from .verdict import Verdict, verdict_name


class EvidenceStore(OpenFolder):
    """Signatures by key, and verdicts by artifact and kind of machine."""

    def signatures(self, key: str) -> SignatureRecord | None:
        """The signatures of what a key names; None for none, and for a damaged record."""
        with contextlib.suppress(OSError, CacheError):
            path = self._path("signatures", key)
            return decode(read_small(path), SignatureRecord, path)
        return None

    def add_signatures(self, record: SignatureRecord) -> None:
        """Keeps signatures beside those of the same artifact that are there. Raises: CacheError."""
        path = self._path("signatures", record.key)
        try:
            write_small(path, encode(record.joined(self.signatures(record.key))), self.root / "tmp")
        except OSError as error:
            raise CacheError(f"{path} cannot be written: {error.strerror}", "is the cache read-only?") from error

    def signed(self, key: str, mef: str) -> SignatureRecord | None:
        """The signatures of an artifact under a key, with that of --sign-with, which is kept where it can be."""
        found = self.signatures(key)
        if self.signing_key is None:
            return found
        record = sign(self.signing_key, key, mef).joined(found)
        if self.writable and record != found:
            try:
                self.add_signatures(record)
            except CacheError as error:
                self.not_kept("signature", error)
        return record

    def verdict(self, mef: str, machine: str) -> Verdict | None:
        """What is known of an artifact on a kind of machine; None when it has not been tried there."""
        path = self._path("verdicts", verdict_name(mef, machine))
        if not self.readable or not self._is_mine(path):
            return None
        with contextlib.suppress(OSError, CacheError):
            found = decode(read_small(path), Verdict, path)
            return found if (found.mef, found.machine) == (mef, machine) else None
        return None

    def keep_verdict(self, verdict: Verdict) -> None:
        """Keeps a verdict where it can be kept; elsewhere the artifact will be tried again."""
        if self.writable:
            try:
                write_small(self._path("verdicts", verdict.name), encode(verdict), self.root / "tmp")
            except OSError as error:
                self.not_kept("verdict on the artifact", error)
