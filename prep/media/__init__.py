"""Images and videos, from a name in an annotation to resized pixels.

In: a media root, a name, and the media settings. Out: :class:`~prep.media.decode.MediaInfo` (the patch grid and the
original size, read from the header), or stored frames (F, 3, H, W) uint8 at their final size. Files, URLs and media
inside records all arrive as a :class:`~prep.media.source.MediaSource`. Decoders run in a child process with a time
limit (``sandbox``). A medium that cannot be used raises :class:`~schemas.errors.MediaError` with a reason code.
"""
