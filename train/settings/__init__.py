"""The settings of a run.

In: the command line, a TOML file of flags, the ``config.json`` of the checkpoint, a DeepSpeed configuration file.
Out: ``TrainArguments`` that do not contradict each other, the ``Recipe`` that fills in what they leave out, and the
record of a run in ``settings.toml``. ``declarations`` declares the flags as ``schemas.setting`` says.
"""
