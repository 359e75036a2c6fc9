"""`demur eval`: does the doubt find the wrong answers? A client of the service (extra `eval`).

A set of questions (`sets`) is asked (`ask`, `runner`) and kept, a line a question (`records`); each
answer's doubt by every detector (`detectors`) is held against its label (`metrics`, `analysis`) and
shown (`report`).
"""
