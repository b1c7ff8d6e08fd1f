"""One command per verb, each thin: parse, call a room, print."""
