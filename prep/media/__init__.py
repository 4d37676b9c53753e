"""Pictures and clips: from a path in an annotation to resized uint8 planes.

``paths`` keeps media inside their root, ``resize`` decides sizes, ``images`` and ``videos`` probe headers and decode.
"""
