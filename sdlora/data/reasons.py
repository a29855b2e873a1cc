"""The short codes that say what was done about a picture, or why it is left out, and the sentence that explains each to a user."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

FIXED: Mapping[str, str] = MappingProxyType(
    {
        "exif-turned": "It is turned the way that the camera noted.",
        "exif-orientation-unknown": "The camera's note of orientation is none of the eight that exist; it is read as stored.",
        "cmyk": "It is stored in printing colours (CMYK) and is converted to RGB.",
        "other-colours": "It is stored in colours other than RGB (YCbCr, Lab or the like) and is converted.",
        "16-bit": "It has 16 or more bits a channel and is scaled to 8.",
        "float": "It holds floating-point numbers; black to its brightest value is scaled to 8 bits.",
        "not-finite": "Some of its numbers are not finite; they are taken as black (NaN), black or white (infinities).",
        "1-bit": "It is black and white only.",
        "palette": "It is stored as a palette of colours and is converted to RGB.",
        "grey": "It is a greyscale picture.",
        "alpha-on-ground": "Its transparent parts are laid on the ground colour.",
        "alpha-as-mask": "What of it is transparent counts less in the loss, as where a mask is black.",
        "icc-to-srgb": "Its colour profile is not sRGB; its colours are converted.",
        "png-gamma-to-srgb": "It says the gamma or the primaries of its colours (PNG's gAMA, cHRM), not sRGB's; its colours are converted.",
        "png-gamma-broken": "What it says of the gamma or the primaries of its colours cannot be; its colours are taken as sRGB.",
        "icc-broken": "Its colour profile cannot be read; its colours are taken as sRGB.",
        "fewer-resolutions": "Some of the resolutions would enlarge it; it is trained at the others.",
        "several-pictures": "The file holds further pictures beside the main one, as phones write them; the main one is used.",
        "data-behind": "Other data follows the picture in its file, such as a film or an archive; it is ignored.",
        "wrong-extension": "Its name says another format than its content; the content counts.",
        "xmp-broken": "Its XMP metadata is no valid text; it is not needed and is ignored.",
        "odd-name": "Its name holds bytes or characters that cannot be shown; they are escaped in reports.",
        "byte-order-mark": "Its caption file starts with a byte order mark, which is no part of the caption.",
        "windows-line-ends": "The lines of its caption file end as on Windows.",
        "caption-from-folder": "Nothing else says a caption, so it is what the folder's name says after the number of repeats.",
        "folder-seen-before": "This folder leads back to one that is read already; it is not read twice.",
    }
)
"""Put right without loss."""

WARNED: Mapping[str, str] = MappingProxyType(
    {
        "fully-transparent": "Every pixel is transparent: only the ground colour is seen.",
        "animation-first-frame": "It is an animation; only its first frame is used.",
        "multi-page": "It has several pages; only the first is used.",
        "no-end-marker": "The file ends before its end mark; it decodes, but its last part may be missing.",
        "metadata-broken": "What its file says about it (EXIF) cannot be read; it may be turned wrongly.",
        "link-outside": "It is reached through a link that leaves the folder.",
        "unicode-twin": "Another file has the same name in another Unicode form; some systems take both for one.",
        "case-twin": "Another file's name differs only in upper and lower case; some systems take both for one.",
        "same-stem": "Another picture has the same name but for its ending; one caption file serves both.",
        "caption-missing": "It has no caption, though others have; only the trigger is learnt with it.",
        "caption-empty": "Its caption says nothing; only the trigger is learnt with it.",
        "caption-large": "Its caption is far longer than any text encoder reads.",
        "several-caption-sources": "Several files have captions for it; the first in the order of precedence that says something counts.",
        "invisible-characters": "Its caption had characters that cannot be seen (control, zero-width, direction of writing); they go.",
        "braces-unbalanced": "Its caption has a brace without its pair, so that it is not read as a choice of words.",
        "orphan-caption": "No picture goes by the name of this caption.",
        "orphan-mask": "No picture goes by the name of this mask.",
        "upscaled": "It is smaller than the size it is trained at and is enlarged, which blurs it.",
    }
)
"""Used, but worth a look."""

LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {
        "empty-file": "The file is empty.",
        "not-a-picture": "Its content is no PNG, JPEG, WebP, BMP, TIFF, GIF or AVIF.",
        "damaged": "It is cut off or damaged and does not decode.",
        "too-large": "It has more pixels than are safe to decode.",
        "too-small": "One of its sides is too short to learn from.",
        "too-much-text": "Its text parts unpack to more than is safe.",
        "no-permission": "This user may not read it.",
        "not-a-file": "It is no regular file (a folder, pipe, socket or device) and is never opened.",
        "dangling-link": "It is a link to something that does not exist.",
        "link-loop": "It is a link that leads back to itself.",
        "folder-not-readable": "This folder cannot be listed.",
        "format-not-read": "Pictures of this format are not read; save it as PNG or JPEG.",
        "mask-shape": "Its mask has another shape than the picture, so that nobody can say what it covers.",
        "unreadable": "It cannot be read.",
    }
)
"""Cannot be used."""

REASONS: Mapping[str, str] = MappingProxyType({**FIXED, **WARNED, **LEFT_OUT})


def fate(codes: Iterable[str]) -> str:
    """What the worst of the codes makes of a picture: left_out, warned, fixed or used."""
    given = set(codes)
    groups = (("left_out", LEFT_OUT), ("warned", WARNED), ("fixed", FIXED))
    return next((name for name, group in groups if given & group.keys()), "used")
