"""Launch scripts of other trainers -> the two commands that do the same here.

In: an upstream shell script, a command line, a YAML of LLaMA-Factory, and the registries of their datasets. They are
read, never run. Out: the words of ``vlprep build`` and of ``train/main.py``, a line for each flag, tables for
``datasets.toml``, and a list of what was not understood.
"""
