"""The command lines: they parse, check and report; the work is done in the other rooms."""
