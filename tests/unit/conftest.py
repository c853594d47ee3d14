"""Settings of all properties: a machine may be busy, so none has a time limit of its own."""

from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
