"""The passes, one idea a file.  Import them as qcompile.passes, through the registry."""
