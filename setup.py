"""The one part of the project that is compiled. Everything else about the package is in setup.cfg."""

from setuptools import Extension, setup

# Optional: without a compiler, vlprep is installed all the same, and Pillow resizes.
setup(
    ext_modules=[
        Extension(
            "prep.media._bicubic",
            ["prep/media/_bicubic.c"],
            # A fused multiply-add would round a weight once where Pillow rounds it twice.
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ]
)
