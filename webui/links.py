"""Addresses of pictures on the disk: made by the server alone, so that no address that somebody thinks up shows a file."""

import base64
import hashlib
import hmac
import io
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from PIL import Image

from sdlora import api
from sdlora.api import UserError
from webui.recent import Recent

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
MAX_KEPT = 512


@dataclass
class Links:
    """Signed addresses; they end with the process."""

    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    small: Recent[bytes] = field(default_factory=lambda: Recent(MAX_KEPT))
    lock: Lock = field(default_factory=Lock)

    def to(self, path: Path, side_px: int = 0) -> str:
        """The address of a picture, at most `side_px` wide and high (0: the file itself); empty if there is none."""
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            return ""
        said = json.dumps([str(path), side_px, stamp]).encode()
        return "/shown/" + base64.urlsafe_b64encode(self._seal(said) + said).decode().rstrip("=")

    def content(self, token: str) -> tuple[bytes, str] | None:
        """What is shown at an address, and its type; None where the address is none of ours or the file is gone."""
        try:
            given = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        except ValueError:
            return None
        seal, said = given[:16], given[16:]
        if not hmac.compare_digest(seal, self._seal(said)):
            return None
        name, side_px, _ = json.loads(said)
        path = Path(name)
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            return None
        if not side_px:
            return path.read_bytes(), "image/png" if path.suffix.lower() == ".png" else "image/jpeg"
        return self._thumbnail(token, path, side_px)

    def _thumbnail(self, token: str, path: Path, side_px: int) -> tuple[bytes, str] | None:
        with self.lock:
            kept = self.small.get(token)
        if kept is None:
            try:
                picture = api.read_picture(path)
            except UserError:
                return None
            picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "JPEG", quality=88)
            kept = buffer.getvalue()
            with self.lock:
                self.small.put(token, kept)
        return kept, "image/jpeg"

    def _seal(self, said: bytes) -> bytes:
        return hmac.digest(self.key, said, hashlib.sha256)[:16]
