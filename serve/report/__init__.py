"""`serve report`: all results on one page; never measures."""
