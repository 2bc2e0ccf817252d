"""The command line: it parses, calls the library and draws; it decides nothing."""
