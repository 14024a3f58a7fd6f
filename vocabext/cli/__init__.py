"""The command line: one thin file per verb that parses, calls one stage and shows the result."""
